"""``vllm serve`` with the backend: the engine runs in a spawned process, as it does in production."""

from __future__ import annotations

import json
import re
import time
import urllib.error

import pytest
from tiny_engine import prompts
from tiny_server import GREEDY, MAX_TOKENS, serve

pytestmark = [pytest.mark.engine, pytest.mark.seam]

SPARSE = {"budget_tokens": 2048, "dense_layers": 1, "min_context_tokens": 0}
PROMPTS = prompts((300, 40, 1), seed=11)


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server"), tiny.model(), SPARSE) as started:
        tiny.stock(PROMPTS, MAX_TOKENS)  # while the server starts
        yield started.wait()


def test_completion(server, tiny):
    got = [server.choice("/v1/completions", prompt=prompt)["token_ids"] for prompt in PROMPTS]
    assert got == tiny.stock(PROMPTS, MAX_TOKENS)


def test_streamed_completion(server, tiny):
    body = {"model": "tiny", "prompt": PROMPTS[0], "stream": True, **GREEDY}
    chunks, streamed = 0, []
    with server.request("/v1/completions", body) as response:
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                streamed += json.loads(data)["choices"][0]["token_ids"] or []
                chunks += 1
    assert streamed == tiny.stock(PROMPTS, MAX_TOKENS)[0]
    assert chunks > 1, "the answer came in one piece"


def test_chat_completion(server, tiny):
    """Chat completion is that of stock vLLM for the same prompt."""
    chat = [{"role": "user", "content": "count the pages of " + "a long book " * 20}]
    with server.request("/v1/chat/completions", {"model": "tiny", "messages": chat, **GREEDY}) as response:
        answer = json.load(response)
    prompt = answer["prompt_token_ids"]
    assert len(prompt) > 240
    assert answer["choices"][0]["token_ids"] == tiny.stock([prompt], MAX_TOKENS)[0]


def test_server_survives_a_long_prompt(server, tiny):
    """Prompt beyond the context is refused and the server still serves."""
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.choice("/v1/completions", prompt=prompts((1500,))[0])
    assert refusal.value.code == 400
    assert "1024" in refusal.value.read().decode()
    assert server.choice("/v1/completions", prompt=PROMPTS[1])["token_ids"] == tiny.stock(PROMPTS, MAX_TOKENS)[1]


def test_log_says_what_ran_sparse(server):
    server.choice("/v1/completions", prompt=PROMPTS[1])  # two reports' worth of decode steps, whatever ran before
    log = server.log.read_text()
    assert "sparse attention: attended" in log
    assert "tokens (100.0%) in decode steps so far" in log
    assert "attention layers sparse (" in log and "1 dense (dense_layers=1: 1)" in log


def test_metrics_endpoint_counts_requests_and_what_was_sparse(server):
    """What workers count is there soon after the answer; tests/test_monitoring.py has the rest."""
    server.choice("/v1/completions", prompt=PROMPTS[2])
    deadline, rows = time.monotonic() + 20, []
    while not any(rows):
        assert time.monotonic() < deadline, "no decode rows"
        time.sleep(0.5)
        with server.request("/metrics") as response:
            text = response.read().decode()
        rows = [float(value) for value in re.findall(r"^vllm:sparse_decode_rows_total{.*} (\S+)$", text, re.M)]
    assert "vllm:generation_tokens_total" in text
    layers = re.findall(r"^vllm:sparse_attention_layers{(.*)} (\S+)$", text, re.M)
    assert {re.search(r'state="(\w+)"', labels)[1]: float(value) for labels, value in layers} == {
        "sparse": 2.0,
        "dense": 1.0,
    }
    assert all('engine="0"' in labels and 'model_name="tiny"' in labels for labels, _ in layers)


def test_a_request_chooses_how_it_is_attended(server, tiny):
    """Exact where it asks for it; sparse where its budget is small, in an engine whose own covers the context."""
    ((prompt, expected),) = list(zip(PROMPTS, tiny.stock(PROMPTS, MAX_TOKENS), strict=True))[:1]
    answers = {
        name: server.choice("/v1/completions", prompt=prompt, vllm_xargs=asked)["token_ids"]
        for name, asked in (
            ("exact", {"sparse": False}),
            ("own", {"sparse": True}),
            ("small", {"sparse_budget": 128}),
        )
    }
    assert answers["exact"] == answers["own"] == expected
    assert answers["small"] != expected
    chat = {"messages": [{"role": "user", "content": "x"}], "vllm_xargs": {"sparse": False}}
    server.choice("/v1/chat/completions", **chat)


REFUSED = [
    ({"sparse_budget": 4096}, "sparse_budget: 4096; allowed: whole numbers of tokens from 128"),
    ({"sparse_budget": 127}, "to 2048, the budget_tokens of this engine"),
    ({"sparse_budget": "512"}, "sparse_budget: '512'; allowed: whole numbers of tokens"),
    ({"sparse_budget": 512.5}, "sparse_budget: 512.5; allowed: whole numbers of tokens"),
    ({"sparse": "false"}, "sparse: 'false'; allowed: true, false"),
    ({"sparse": False, "sparse_budget": 512}, "sparse_budget: 512 with sparse=false"),
    ({"sparse_budgets": 512}, "'sparse_budgets': unknown key. Did you mean 'sparse_budget'?"),
]


@pytest.mark.parametrize("asked, said", REFUSED, ids=[str(asked) for asked, _ in REFUSED])
def test_wrong_values_of_a_request_are_refused(server, asked, said):
    for path, body in (
        ("/v1/completions", {"prompt": PROMPTS[2]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            server.choice(path, vllm_xargs=asked, **body)
        assert refusal.value.code == 400
        assert said in json.load(refusal.value)["error"]["message"]
    server.choice("/v1/completions", prompt=PROMPTS[2])
