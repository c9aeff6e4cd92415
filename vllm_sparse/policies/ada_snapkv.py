"""Ada-SnapKV: SnapKV whose KV heads share out a layer's budget."""

from __future__ import annotations

from vllm_sparse.policies.snapkv import SnapKV


class AdaSnapKV(SnapKV):
    """A layer's best pages of all KV heads count, not each head's: heads that attend widely get more.

    From a quarter of the budget to twice, and the budget in the mean of the heads that a GPU holds. Feng et
    al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation", arXiv 2407.11550. Shares are
    listed with the pages, and scores past them count nothing, so rows end there.
    """

    adaptive = True
    coverage = 0.9998
    largest_share = 2.0
