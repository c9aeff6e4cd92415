"""``vllm serve`` with the backend: the engine runs in a spawned process, as it does in production."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from process import running
from tiny_engine import ENGINE, prompts

pytestmark = pytest.mark.engine

SPARSE = {"budget_tokens": 2048, "dense_layers": 1, "min_context_tokens": 0}
START_SECONDS = 240
MAX_TOKENS = 48
PROMPTS = prompts((300, 40, 1), seed=11)


class Server:
    def __init__(self, process: subprocess.Popen, port: int, log: Path):
        self.process, self.url, self.log = process, f"http://127.0.0.1:{port}", log

    def request(self, path: str, body: dict | None = None):
        """The raw response; POST where there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=120)

    def choice(self, path: str, **body) -> dict:
        with self.request(path, {"model": "tiny", **GREEDY, **body}) as response:
            (choice,) = json.load(response)["choices"]
        return choice

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()[-6000:]}"
            try:
                self.request("/health").close()
                return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-6000:]}")


GREEDY = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {**ENGINE, "block_size": 32, "port": port, "host": "127.0.0.1", "served_model_name": "tiny"}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    arguments += [
        "--enforce-eager",
        "--attention-backend=sparse",
        f"--additional-config={json.dumps({'sparse': SPARSE})}",
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [Path(sys.executable).parent / "vllm", "serve", tiny.model(), *arguments]
    # As in production: an engine process of its own, and warm-up steps, which have no attention metadata.
    with running(command, log, VLLM_ENABLE_V1_MULTIPROCESSING=None, VLLM_CPU_CI_ENV=None) as process:
        tiny.stock(PROMPTS, MAX_TOKENS)  # while the server starts
        started = Server(process, port, log)
        started.wait()
        yield started


def test_completions_are_those_of_stock_vllm(server, tiny):
    got = [server.choice("/v1/completions", prompt=prompt)["token_ids"] for prompt in PROMPTS]
    assert got == tiny.stock(PROMPTS, MAX_TOKENS)


def test_streamed_completion_is_that_of_stock_vllm(server, tiny):
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


def test_chat_completion_is_that_of_stock_vllm_for_the_same_prompt(server, tiny):
    chat = [{"role": "user", "content": "count the pages of " + "a long book " * 20}]
    with server.request("/v1/chat/completions", {"model": "tiny", "messages": chat, **GREEDY}) as response:
        answer = json.load(response)
    prompt = answer["prompt_token_ids"]
    assert len(prompt) > 240
    assert answer["choices"][0]["token_ids"] == tiny.stock([prompt], MAX_TOKENS)[0]


def test_prompt_beyond_the_context_is_refused_and_the_server_still_serves(server, tiny):
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
    assert "sparse attention: layers run dense: dense_layers=1" in log


def test_metrics_endpoint_counts_the_requests(server):
    server.choice("/v1/completions", prompt=PROMPTS[2])
    with server.request("/metrics") as response:
        assert "vllm:generation_tokens_total" in response.read().decode()
