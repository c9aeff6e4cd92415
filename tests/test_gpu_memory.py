"""No step takes memory that was given to the KV cache, at any chunk size, and no prefill waits for the device.

Each engine takes 0.9 of the GPU, in a process of its own, and serves 16 prompts of 1K to 64K tokens at once by one
prefill policy after the other. FlashAttention-3 once asked such a mix for 5.54 GiB.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cases import ON_GPU
from process import running

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")]

SCRIPT = Path(__file__).with_name("run_step_memory.py")
CHUNKS = {8192: "eager", 16384: "compiled", 32768: "eager"}
POLICIES = ("dense", "vertical_slash", "xattention", "flex_prefill")
SPARSE_POLICIES = POLICIES[1:]
MIB = 1 << 20
SMALL_BYTES = 2 * MIB
"""What calls may take beside what is planned: scheduling data and copies of starts, each a few KiB, in pieces that
PyTorch rounds up."""
STOCK_BYTES = 64 * MIB
"""What a step of stock vLLM takes that its own measuring run does not see: log-sums and parts of its dense
attention (4 MiB of log-sums for 32,768 tokens of 32 heads), copies of block tables, tokens on their way out."""
PIECES_BYTES = 2048 * MIB
"""By which memory that PyTorch holds may exceed what is allocated at once: pieces that others do not fit."""
SECONDS = 240

both = pytest.mark.parametrize(
    ("chunk_tokens", "policy"), [(chunk, policy) for chunk in CHUNKS for policy in POLICIES]
)
sparse = pytest.mark.parametrize(
    ("chunk_tokens", "policy"), [(chunk, policy) for chunk in CHUNKS for policy in SPARSE_POLICIES]
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What one engine of each chunk size took, measured once."""
    pytest.importorskip("vllm")
    known: dict[int, dict | str] = {}

    def of(chunk_tokens: int) -> dict:
        if chunk_tokens not in known:
            log = tmp_path_factory.mktemp("memory") / f"{chunk_tokens}.log"
            with running([sys.executable, SCRIPT, chunk_tokens, CHUNKS[chunk_tokens]], log) as process:
                try:
                    code = process.wait(SECONDS)
                except subprocess.TimeoutExpired:
                    code = f"none within {SECONDS} s"
            lines = log.read_text(errors="replace").splitlines()
            results = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
            known[chunk_tokens] = json.loads(results[0]) if results else "\n".join([f"exit {code}", *lines[-60:]])
        found = known[chunk_tokens]
        if isinstance(found, str):
            pytest.fail(f"the engine with chunks of {chunk_tokens} did not finish: {found}")
        return found

    return of


def mib(count: int) -> str:
    return f"{count / MIB:.1f} MiB"


@both
def test_mix_needs_what_was_measured(measured, chunk_tokens, policy):
    """Above what lay on the GPU after start, a step takes what vLLM found in its measuring run and kept free."""
    found = measured(chunk_tokens)
    of = found["policies"][policy]
    assert found["rehearsed_tokens"] >= chunk_tokens, "the largest calls were not made while vLLM measured"
    allowed = found["profiled_bytes"] + STOCK_BYTES
    assert of["above_start_bytes"] <= allowed, (
        f"steps took {mib(of['above_start_bytes'])}, measured were {mib(found['profiled_bytes'])}: {of}"
    )
    assert of["left_bytes"] <= STOCK_BYTES, f"{mib(of['left_bytes'])} were never freed: {of}"
    assert of["retries"] == 0, f"PyTorch ran out of memory {of['retries']} times and gave back what it held: {of}"
    assert of["used_bytes"] <= 0.9 * found["total_bytes"] + PIECES_BYTES, f"{mib(of['used_bytes'])} in use: {of}"


@sparse
def test_prefill_takes_what_is_planned(measured, chunk_tokens, policy):
    """Sparse prefill takes what is planned and no more."""
    found = measured(chunk_tokens)
    of = found["policies"][policy]
    assert of["sparse_pairs"] > 0, "nothing was sparse"
    allowed = found["planned_bytes"] + SMALL_BYTES
    assert of["sparse_prefill_bytes"] <= allowed, (
        f"one chunk in one layer took {mib(of['sparse_prefill_bytes'])} beside its buffers; planned are "
        f"{mib(found['planned_bytes'])} for {found['engine']}"
    )


@both
def test_nothing_waits_for_the_device(measured, chunk_tokens, policy):
    """In bfloat16, with and without a prefill policy, in chunks and decode steps."""
    assert measured(chunk_tokens)["policies"][policy]["waits"] == []


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_dense_prefill_chooses_nothing(measured, chunk_tokens):
    """Else the rows above said nothing of it."""
    of = measured(chunk_tokens)["policies"]["dense"]
    assert of["sparse_pairs"] == 0 and of["sparse_prefill_bytes"] == 0 and of["stock_dense_bytes"] > 0
