"""NIXL between a prefill and a decode server: summaries arrive with K and V, over the real library, on a CPU."""

from __future__ import annotations

import json
import re
import urllib.error
from contextlib import suppress

import pytest
from process import free_port
from test_tensor_parallel import WORKERS
from tiny_engine import prompts, tokens
from tiny_server import GREEDY, serve

pytest.importorskip("vllm")
pytest.importorskip("nixl")

pytestmark = pytest.mark.engine

PROMPTS, NUM_TOKENS = prompts((40, 300, 700)), 16
QUEST = {"decode_policy": "quest", "budget_tokens": 128, "dense_layers": 0, "min_context_tokens": 0}
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
MULTI = {
    "kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"connectors": [NIXL]},
}  # fmt: skip


def start(folder, model, connector: dict):
    """A server with a NIXL agent of its own."""
    folder.mkdir()
    side = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    return serve(folder, model, QUEST, f"--kv-transfer-config={json.dumps(connector)}", **WORKERS, **side)


def prefilled(server, prompt: list[int]) -> dict:
    """What a prefill server says of the pages of a prompt, as a proxy would pass it on."""
    asked = {"do_remote_decode": True, "do_remote_prefill": False}
    body = {"model": "tiny", "prompt": prompt, **GREEDY, "max_tokens": 1, "kv_transfer_params": asked}
    with server.request("/v1/completions", body) as response:
        return json.load(response)["kv_transfer_params"]


def shake_hands(prefill, decode) -> None:
    """Have the two meet, for which NIXL gives a peer five seconds, too few on a busy machine."""
    for _ in range(5):
        with suppress(urllib.error.HTTPError):
            prompt = prompts((33,), seed=7)[0]
            decode.choice("/v1/completions", prompt=prompt, kv_transfer_params=prefilled(prefill, prompt))
            return


def external_tokens(server) -> int:
    """Prompt tokens whose pages came from elsewhere."""
    with server.request("/metrics") as response:
        found = re.findall(
            r"^vllm:external_prefix_cache_hits_total\{.*\} ([\d.e+]+)$", response.read().decode(), re.M
        )
    return round(sum(map(float, found)))


def test_a_decode_engine_goes_on_from_pages_of_a_prefill_engine(tiny, tmp_path):
    """The connector of the second is inside a MultiConnector."""
    model = tiny.model()
    with start(tmp_path / "p", model, NIXL) as prefill, start(tmp_path / "d", model, MULTI) as decode:
        with tiny.start(model, QUEST) as llm:  # while the servers start
            expected = tokens(llm, PROMPTS, NUM_TOKENS)
        assert expected != tiny.stock(PROMPTS, NUM_TOKENS, model=model), "summaries were not needed"
        prefill.wait(), decode.wait()
        shake_hands(prefill, decode)
        before = external_tokens(decode)
        pages = [prefilled(prefill, prompt) for prompt in PROMPTS]
        assert all("-sparse1-key_range-32-float32" in where["remote_engine_id"] for where in pages)
        answers = [
            decode.choice("/v1/completions", prompt=prompt, max_tokens=NUM_TOKENS, kv_transfer_params=where)
            for prompt, where in zip(PROMPTS, pages, strict=True)
        ]
        assert [answer["token_ids"] for answer in answers] == expected
        transferred = external_tokens(decode) - before
        assert transferred == sum(map(len, PROMPTS)), "pages were computed, not transferred"
        with pytest.raises(urllib.error.HTTPError) as refusal:
            other = {**pages[0], "remote_engine_id": "stock"}
            decode.choice("/v1/completions", prompt=PROMPTS[0], kv_transfer_params=other)
        assert refusal.value.code == 400 and "another format" in refusal.value.read().decode()
