"""TuneWorker: vLLM mixes it into each of its workers (``worker_extension_cls``)."""

from __future__ import annotations

from vllm.distributed import get_tensor_model_parallel_rank

from vllm_sparse.pages.head_patterns import HeadPattern
from vllm_sparse.tools.tune.budgets import MeasuredDecode
from vllm_sparse.tools.tune.measure import MeasuredPrefill


class TuneWorker:
    """Methods for ``collective_rpc``: plain data in and out, so that workers may be other processes."""

    def tune_start(self, candidates: list[dict]) -> None:
        """Measure the prefill of all sparse layers from now on; ``candidates`` are fields of patterns."""
        patterns = [HeadPattern(**fields) for fields in candidates]
        self._watch(lambda impl: MeasuredPrefill.around(impl.prefill, patterns))

    def tune_start_decode(self, most_tokens: int) -> None:
        """Measure what decode budgets up to ``most_tokens`` would hold in all sparse layers from now on."""
        self._watch(lambda impl: MeasuredDecode.around(impl.prefill, impl.num_kv_heads, most_tokens))

    def _watch(self, around) -> None:
        self._tuned = {}
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            impl = getattr(layer, "impl", None)
            if getattr(impl, "prefill", None) is not None and impl.is_sparse:
                impl.prefill = self._tuned[impl.layer_index] = around(impl)

    def tune_take(self) -> dict:
        """The sums of this worker's layers since it was last asked; waits for the device."""
        layers = {str(index): measured.take() for index, measured in self._tuned.items()}
        return {"rank": get_tensor_model_parallel_rank(), "layers": layers}
