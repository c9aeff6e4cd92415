"""In-process engines of tiny models on a CPU, and what stock vLLM answers to the same prompts."""

from __future__ import annotations

import gc
import hashlib
from contextlib import contextmanager
from pathlib import Path

import tiny_model
import torch

MIXED_LENGTHS = (1, 5, 40, 300, 700)
"""Prompt tokens: the longest takes several chunks, and more requests than fit in a batch."""
ENGINE = {
    "max_model_len": 1024,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "dtype": "float32",
    "kv_cache_memory_bytes": 32 << 20,
    # Without the warm-up of kernels, some of which Triton's interpreter cannot run.
    "enforce_eager": True,
}
SPARSE = {"budget_tokens": 128, "dense_layers": 0, "min_context_tokens": 0}
"""A budget far below the longest prompts, in every layer and at every length."""


def prompts(lengths=MIXED_LENGTHS, seed: int = 1, shared: int = 0) -> list[list[int]]:
    """Random prompts of ``lengths`` tokens, the first ``shared`` tokens the same in all."""
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.randint(1, tiny_model.VOCAB, (shared,), generator=generator).tolist()
    rest = [torch.randint(1, tiny_model.VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [(prefix + tail)[:length] for tail, length in zip(rest, lengths, strict=True)]


def outputs(llm, token_lists, max_tokens: int = 16) -> list:
    """Greedy request outputs, exactly ``max_tokens`` tokens each."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": tokens} for tokens in token_lists], params, use_tqdm=False)


def tokens(llm, token_lists, max_tokens: int = 16) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs(llm, token_lists, max_tokens)]


def cached_tokens(results) -> list[int]:
    """Tokens of each prompt that came from the prefix cache."""
    return [output.num_cached_tokens or 0 for output in results]


def engine_core(llm):
    return llm.llm_engine.engine_core.engine_core


def attention_layers(llm) -> dict:
    """Attention layers of the running engine by name."""
    config = engine_core(llm).vllm_config.compilation_config
    return {name: layer for name, layer in config.static_forward_context.items() if hasattr(layer, "impl")}


def kv_cache(layer) -> torch.Tensor:
    """[num_blocks, kv_heads, page_size + summary slots, 2 * head_dim] of a layer."""
    return layer.kv_cache[0] if isinstance(layer.kv_cache, list) else layer.kv_cache


@contextmanager
def preemptions():
    """A list that fills with (request id, output tokens it had) while requests are preempted."""
    from vllm.v1.core.sched.scheduler import Scheduler

    seen, original = [], Scheduler._preempt_request

    def preempt(self, request, *args, **kwargs):
        seen.append((request.request_id.split("-")[0], request.num_output_tokens))
        return original(self, request, *args, **kwargs)

    Scheduler._preempt_request = preempt
    try:
        yield seen
    finally:
        Scheduler._preempt_request = original


def _nothing() -> None:
    pass


class TinyEngines:
    """Models and stock answers, made once per test session."""

    def __init__(self, root: Path):
        from vllm.model_executor.models import registry

        self.root = root
        self._stock: dict = {}
        self._running = False
        # An engine collects garbage eight times, among all that was ever imported: three of its four seconds. Here
        # among what came after the engine before.
        self._gc = gc.freeze, gc.unfreeze
        gc.freeze = gc.unfreeze = _nothing
        # To look at a new architecture's class, vLLM starts a process that imports vLLM: ten seconds each.
        registry._run_in_subprocess = lambda look: look()

    def close(self) -> None:
        """Give back what was taken from the garbage collector."""
        gc.freeze, gc.unfreeze = self._gc
        gc.unfreeze()

    def model(self, model_type: str = "llama", **changes) -> Path:
        """A model; with an ``architecture`` one whose weights an engine draws."""
        name = hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:12]
        make = tiny_model.describe if "architecture" in changes else tiny_model.make
        return make(self.root / f"{model_type}-{name}", model_type, **changes)

    @contextmanager
    def start(self, model: Path | None = None, sparse: dict | None = None, backend="sparse", **changes):
        """An engine with fresh counters; ``sparse`` changes :data:`SPARSE`."""
        import tiny_weights
        from vllm import LLM
        from vllm.v1.attention.selector import _cached_get_attn_backend

        from vllm_sparse import metrics

        assert not self._running, "one engine at a time: counters are the process's"
        metrics.reset()
        _cached_get_attn_backend.cache_clear()  # choices of an engine before were counted then
        settings = {**ENGINE, "block_size": 32, **changes}
        if backend is not None:
            settings["attention_backend"] = backend
        if backend != "CPU_ATTN" and "additional_config" not in settings:
            settings["additional_config"] = {"sparse": {**SPARSE, **(sparse or {})}}
        model = model or self.model()
        if not any(model.glob("*.safetensors")):
            settings.setdefault("load_format", tiny_weights.DRAWN)
        gc.collect()
        self._gc[0]()
        llm = LLM(str(model), **settings)
        self._running = True
        try:
            yield llm
        finally:
            self._running = False
            llm.llm_engine.engine_core.shutdown()

    def stock(self, token_lists, max_tokens: int = 16, model: Path | None = None, **changes) -> list[list[int]]:
        """What stock vLLM generates, each answer computed once per session."""
        key = (model, max_tokens, repr(token_lists), repr(changes))
        if key not in self._stock:
            with self.start(model, backend="CPU_ATTN", **{**changes, "block_size": 32}) as llm:
                self._stock[key] = tokens(llm, token_lists, max_tokens)
        return self._stock[key]
