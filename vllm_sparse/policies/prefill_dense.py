"""Dense prefill: every page, through vLLM's own attention; the baseline inside the same backend."""

from __future__ import annotations

from vllm_sparse.policies.prefill_base import PrefillPolicy


class DensePrefill(PrefillPolicy):
    """Chooses every page, so there is nothing to choose: the backend attends densely."""

    def choose(self, q, kv, block_table, blocks, scale, buffers, keep):
        raise AssertionError("the dense policy has no keep mask; the backend attends to every page")
