"""RecallProbe: how much attention mass the chosen pages of a step hold, beside the best ones.

In every N-th decode step of a layer the exact mass of every page is computed (the ``oracle`` policy's score). By
it the best pages are taken, of the same number and beside the same sinks and window, and both choices are weighed.
The step itself is not changed.
"""

from __future__ import annotations

import torch

from vllm_sparse import kernels
from vllm_sparse.attention.base import AttentionKernel
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.page_scores import PageScores
from vllm_sparse.pages.page_table import PageTable


class RecallProbe:
    """The sums of one layer; a policy and an attention kernel that add to them stand in for the layer's own."""

    def __init__(self, impl, exact: dict[tuple, PageScores]):
        """``exact``: buffers by their shape, which the probes of all layers share."""
        self.impl, self.exact = impl, exact
        self.attention = _Attention(impl.attention, self)
        self.every = 0
        self.reset()

    def watch(self, policy, every: int):
        """``policy`` with its choices weighed in every ``every``-th step that chooses, from now on; 0: none."""
        self.every = every
        self.reset()
        return _Policy(policy, self) if every else policy

    def reset(self) -> None:
        kv_heads, device = self.impl.num_kv_heads, self.impl.device
        self.steps = self.rows = 0
        self.chosen_mass = torch.zeros(kv_heads, dtype=torch.float64, device=device)
        self.best_mass = torch.zeros(kv_heads, dtype=torch.float64, device=device)
        self.pending = None

    def scored(self, *step) -> None:
        """Keep what a policy scored, to be weighed when the attention kernel shows what was chosen."""
        self.pending = step if self.steps % self.every == 0 else None
        self.steps += 1

    def attended(self, table: PageTable) -> None:
        if self.pending is None:
            return
        (q, kv, block_table, plan, geometry, scores), self.pending = self.pending, None
        impl, device, page_size = self.impl, q.device, geometry.page_size
        shape = tuple(scores.values.shape)
        if shape not in self.exact:
            parts = (scores.values, scores.chunk_lse, scores.arrivals)
            self.exact[shape] = PageScores(*(torch.zeros_like(part) for part in parts))
        exact = self.exact[shape]
        kernels.for_device(device).page_mass(q, kv, block_table, plan, geometry, exact)
        kv_heads = kv.shape[1]
        for request, offset in enumerate(plan.score_offsets.tolist()):
            if offset < 0 or not (length := int(plan.table_seq_lens[request])):
                continue
            blocks = block_table[request, : -(-length // page_size)]
            mass = exact.values[:, offset : offset + len(blocks)].double().softmax(-1)
            mass = mass.unflatten(0, (kv_heads, -1)).mean(1)
            ranked = mass.clone()
            ranked[:, : impl.selection.sink_pages] = float("inf")
            ranked[:, max(0, min(length - impl.config.window_tokens, length - 1)) // page_size :] = float("inf")
            self.rows += 1
            for head in range(kv_heads):
                row = request * kv_heads + head
                count = -(-int(table.lengths[row]) // page_size)
                chosen = torch.isin(blocks, HeadPageGrid.of(kv).split(table.head_pages[row, :count])[0])
                self.chosen_mass[head] += mass[head, chosen].sum()
                self.best_mass[head] += mass[head, ranked[head].topk(count).indices].sum()

    def take(self) -> dict:
        """The sums since :meth:`watch`, as plain data; waits for the device."""
        return {"rows": self.rows, "chosen": self.chosen_mass.tolist(), "best": self.best_mass.tolist()}


class _Policy:
    def __init__(self, policy, probe: RecallProbe):
        self.policy, self.probe = policy, probe

    def __getattr__(self, name: str):
        return getattr(self.policy, name)

    def score(self, *step) -> None:
        self.policy.score(*step)
        self.probe.scored(*step)


class _Attention(AttentionKernel):
    def __init__(self, attention: AttentionKernel, probe: RecallProbe):
        self.attention, self.probe = attention, probe

    @classmethod
    def unsupported(cls, shape):
        return None

    def attend(self, q, kv, table, *more):
        self.probe.attended(table)
        self.attention.attend(q, kv, table, *more)

    def attend_blocks(self, *args):
        self.attention.attend_blocks(*args)
