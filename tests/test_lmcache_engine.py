"""LMCache's server beside an engine, on a CPU: blocks come back with their summaries, and no other engine's do."""

from __future__ import annotations

import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from process import free_port, running
from tiny_engine import attention_layers, cached_tokens, kv_cache, outputs, prompts, tokens

pytest.importorskip("vllm")
pytest.importorskip("lmcache")

pytestmark = pytest.mark.engine

PROMPTS, NUM_TOKENS = prompts((40, 300, 700)), 16
CHUNK = 64
"""Tokens: two blocks."""
WHOLE_CHUNKS = [0, 4, 10]
QUEST = {"decode_policy": "quest", "budget_tokens": 128}


@pytest.fixture(scope="module")
def connector(tmp_path_factory):
    """The ``kv_transfer_config`` of engines beside a server that runs."""
    port, http = free_port(), free_port()
    log = tmp_path_factory.mktemp("lmcache") / "log"
    command = [
        sys.executable, "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1", "--port", port,
        "--l1-size-gb", 0.2, "--eviction-policy", "LRU", "--chunk-size", CHUNK, "--http-port", http,
        "--supported-transfer-mode", "engine_driven",
    ]  # fmt: skip
    with running(command, log, LMCACHE_TRACK_USAGE="false") as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{http}/healthcheck", timeout=1).close()
                break
            except OSError:
                time.sleep(0.3)
        extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
        yield {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


@pytest.fixture(autouse=True)
def kernels_found(monkeypatch):
    """LMCache imports numba, in whose modules vLLM's search for kernels of Triton's, to replace them, fails."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    register = platform.register_triton_kernel_overrides.__func__

    def without_llvm(cls) -> None:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("llvmlite")}
        try:
            register(cls)
        finally:
            sys.modules.update(hidden)

    monkeypatch.setattr(platform, "register_triton_kernel_overrides", classmethod(without_llvm))


@contextmanager
def start(tiny, connector, sparse):
    with tiny.start(sparse=sparse, kv_transfer_config=dict(connector), enable_prefix_caching=False) as llm:
        yield llm


def test_blocks_come_back_with_their_summaries(tiny, connector):
    with start(tiny, connector, QUEST) as llm:
        computed = tokens(llm, PROMPTS, NUM_TOKENS)
    assert computed != tiny.stock(PROMPTS, NUM_TOKENS), "the budget changed nothing: summaries were not needed"
    with start(tiny, connector, QUEST) as llm:
        results = outputs(llm, PROMPTS, NUM_TOKENS)
        for layer in attention_layers(llm).values():
            filled = kv_cache(layer)[:, :, 32:].abs().sum((1, 2, 3)) > 0
            assert filled.sum() >= sum(WHOLE_CHUNKS) * CHUNK // 32, "summaries did not come with their pages"
    assert cached_tokens(results) == [CHUNK * chunks for chunks in WHOLE_CHUNKS], "nothing was loaded"
    assert [list(result.outputs[0].token_ids) for result in results] == computed
    with start(tiny, connector, {**QUEST, "decode_policy": "sketch"}) as llm:
        assert cached_tokens(outputs(llm, PROMPTS, 1)) == [0, 0, 0], "blocks of other settings were loaded"
