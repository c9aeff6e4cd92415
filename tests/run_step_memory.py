"""One engine on a GPU, with an 8B model's shape in a few layers, whose steps are measured: prints one JSON line.

    python run_step_memory.py CHUNK_TOKENS eager|compiled

It takes 0.9 of the GPU, so it runs in a process of its own; :mod:`test_gpu_memory` says what must hold.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch

from vllm_sparse.backend import prefill_rows

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1"}

LAYERS = 4
SHAPE = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128256, hidden_size=4096,
    intermediate_size=14336, num_hidden_layers=LAYERS, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0, hidden_act="silu",
    tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MAX_MODEL_LEN = 65536 + 512
PROMPTS, SHORTEST, LONGEST = 16, 10, 16
"""Number of prompts, and exponents of 2 of the shortest and the longest."""
NO_WAIT_LENGTHS = (9000, 700, 40, 4500)
UTILIZATION = 0.9
SPARSE = {
    "prefill_policy": "vertical_slash", "vertical_tokens": 1024, "slash_tokens": 512, "prefill_top_p": 0,
    "min_prefill_tokens": 2048, "dense_layers": 1,
}  # fmt: skip
POLICIES = {
    "dense": {},
    "vertical_slash": {},
    "xattention": {"prefill_top_p": 0.9},
    "flex_prefill": {"prefill_top_p": 0.9},
}


def mix() -> list[list[int]]:
    """Prompts of 1K to 64K tokens, evenly spread over powers of 2."""
    source = random.Random(7)
    lengths = [int(2 ** source.uniform(SHORTEST, LONGEST)) for _ in range(PROMPTS)]
    return [prompt(length, index) for index, length in enumerate(lengths)]


def prompt(length: int, index: int) -> list[int]:
    return [(7 * place + 13 * index) % (SHAPE["vocab_size"] - 10) + 10 for place in range(length)]


class Meter:
    """Most that functions hold beside what was there when they were called, as the caching allocator counts it."""

    def __init__(self):
        self.peak = 0
        """Most bytes allocated since :meth:`start`, in whatever code."""
        self.most: dict[str, int] = {}

    def start(self) -> None:
        self._restart()
        self.peak, self.most = 0, dict.fromkeys(self.most, 0)

    def _restart(self) -> None:
        self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    def finish(self) -> None:
        self._restart()

    def watch(self, cls: type, method: str, name: str) -> None:
        """Measure every call of ``cls.method``; functions that are watched do not call each other."""
        run = getattr(cls, method)
        self.most[name] = 0

        def measured(*args, **kwargs):
            self._restart()
            before = torch.cuda.memory_allocated()
            result = run(*args, **kwargs)
            self.most[name] = max(self.most[name], torch.cuda.max_memory_allocated() - before)
            return result

        setattr(cls, method, measured)


def start(chunk_tokens: int, compiled: bool):
    from vllm import LLM

    settings = {}
    if not compiled:
        # Attention of a decode step in a graph, the rest as it is: the start is then short.
        sizes = [1, 2, 4, 8, 16]
        settings["compilation_config"] = {
            "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes,
        }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        return LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=MAX_MODEL_LEN, max_num_seqs=16,
            max_num_batched_tokens=chunk_tokens, gpu_memory_utilization=UTILIZATION, enable_prefix_caching=False,
            disable_log_stats=True, attention_backend="sparse", additional_config={"sparse": SPARSE}, **settings,
        )  # fmt: skip


def generate(llm, prompts: list[list[int]], tokens: int) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def choose_policy(impls: list, name: str) -> None:
    """Let a running engine prefill by another policy: buffers and engines are the same for all."""

    if not hasattr(choose_policy, "sparse_chunks"):
        choose_policy.sparse_chunks = prefill_rows.sparse_chunks
    prefill_rows.sparse_chunks = (lambda *args: []) if name == "dense" else choose_policy.sparse_chunks
    if name != "dense":
        for impl in impls:
            config = dataclasses.replace(impl.config, prefill_policy=name, **POLICIES[name])
            impl.prefill.policy = config.new_prefill_policy(impl.page_size, impl._patterns())


def waits(llm) -> list[str]:
    """Lines of this package in whose calls a batch made the host wait: PyTorch reports every such call."""
    ours = []

    def record(message, *_):
        frames = [frame for frame in traceback.extract_stack() if "vllm_sparse" in frame.filename]
        if frames:
            ours.append(f"{message} {frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}")

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = record
            generate(llm, [prompt(length, index) for index, length in enumerate(NO_WAIT_LENGTHS)], 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sorted(set(ours))


def measure(chunk_tokens: int, compiled: bool) -> dict:
    from vllm_sparse import metrics
    from vllm_sparse.attention import fa3_attn
    from vllm_sparse.backend import dense
    from vllm_sparse.backend.impl import SparseImpl
    from vllm_sparse.prefill.attend import SparsePrefill

    meter = Meter()
    meter.watch(SparsePrefill, "attend", "sparse_prefill")
    meter.watch(SparseImpl, "_decode", "decode")
    meter.watch(dense.StockDense, "attend", "stock_dense")
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    llm = start(chunk_tokens, compiled)
    worker = llm.llm_engine.model_executor.driver_worker.worker
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    impls = [layer.impl for layer in layers if isinstance(getattr(layer, "impl", None), SparseImpl)]
    torch.cuda.synchronize()
    at_start = torch.cuda.memory_allocated()
    buffers = impls[0].workspace.prefill
    at_once = min(chunk_tokens, buffers.max_blocks * 128)
    log_sums, scheduling = 4 * at_once * buffers.q_heads, 16 * buffers.q_heads * buffers.max_blocks
    found = {
        "chunk_tokens": chunk_tokens, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "engine": type(impls[0].prefill_attention).__name__, "layers": len(impls), "total_bytes": total_bytes,
        "planned_bytes": fa3_attn.PARTS_BYTES + log_sums + scheduling,
        "profiled_bytes": int(worker.peak_activation_memory),
        "rehearsed_tokens": impls[0].workspace.rehearsed_tokens, "policies": {},
    }  # fmt: skip
    for name in POLICIES:
        choose_policy(impls, name)
        pairs = metrics.snapshot()["prefill_attended_pairs"]
        meter.start()
        generate(llm, mix(), 16)
        meter.finish()
        torch.cuda.synchronize()
        found["policies"][name] = {
            "above_start_bytes": meter.peak - at_start, **{f"{part}_bytes": n for part, n in meter.most.items()},
            "left_bytes": torch.cuda.memory_allocated() - at_start,
            "reserved_bytes": torch.cuda.memory_reserved(), "allocated_at_start_bytes": at_start,
            "used_bytes": free_bytes - torch.cuda.mem_get_info()[0],
            "retries": torch.cuda.memory_stats()["num_alloc_retries"],
            "sparse_pairs": metrics.snapshot()["prefill_attended_pairs"] - pairs,
            "waits": waits(llm),
        }  # fmt: skip
    return found


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    # Tests set it for engines on a CPU, and this one may compile.
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    print("RESULT", json.dumps(measure(int(sys.argv[1]), sys.argv[2] == "compiled")), flush=True)
