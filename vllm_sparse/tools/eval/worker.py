"""EvalWorker: vLLM mixes it into each of its workers (``worker_extension_cls``)."""

from __future__ import annotations

from dataclasses import replace

from vllm.distributed import get_tensor_model_parallel_rank

from vllm_sparse import metrics
from vllm_sparse.backend import check
from vllm_sparse.backend.builder import SparseMetadataBuilder
from vllm_sparse.config import SparseConfig
from vllm_sparse.policies import DECODE_POLICIES
from vllm_sparse.prefill.gate import AUTO
from vllm_sparse.tools.eval.recall import RecallProbe


class EvalWorker:
    """Methods for ``collective_rpc``: plain data in and out, so that workers may be other processes.

    The engine must run eagerly, for a CUDA graph would replay the setting it was captured with, and must
    have started with the largest budget and with a policy whose summaries are those of all settings.
    """

    def eval_switch(self, settings: dict, recall_every: int) -> None:
        """Attend by ``settings`` from the next step on, as if the engine had started with them."""
        config = SparseConfig.from_mapping(settings, "settings")
        config = check.with_tables(self.vllm_config, config)
        if config.prefill_policy == AUTO and self.model_config.max_model_len <= config.least_auto_tokens:
            # An engine that starts with it has no buffers, either: no prompt is long enough.
            config = replace(config, prefill_policy="dense")
        for builder in self._builders():
            config.check_page_size(builder.page_size)
            builder.configure(config)
        exact: dict = {}
        for impl in self._layers():
            probe = getattr(impl, "recall_probe", None)
            if probe is None:
                probe = impl.recall_probe = RecallProbe(impl, exact)
                impl.attention = probe.attention
            impl.configure(config)
            policy = probe.watch(DECODE_POLICIES[config.decode_policy], recall_every)
            if impl.decode is not None:
                impl.decode.policy = policy

    def eval_counts(self) -> dict:
        """What ran sparse so far; waits for the device."""
        return metrics.snapshot(self)

    def eval_recall(self) -> dict:
        """Recall of this worker's layers since the switch; waits for the device."""
        layers = {str(impl.layer_index): impl.recall_probe.take() for impl in self._layers()}
        return {"rank": get_tensor_model_parallel_rank(), "layers": layers}

    def _builders(self) -> list[SparseMetadataBuilder]:
        return [
            builder
            for groups in self.model_runner.attn_groups
            for group in groups
            for builder in group.metadata_builders
            if isinstance(builder, SparseMetadataBuilder) and builder.selects
        ]

    def _layers(self) -> list:
        layers = self.vllm_config.compilation_config.static_forward_context
        impls = [layers[name].impl for builder in self._builders() for name in builder.layer_names]
        return [impl for impl in impls if impl.is_sparse]
