"""How much attention the best pages of each KV head hold, and the budgets that hold most of it together."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from vllm_sparse.decode.budgets import BudgetTable
from vllm_sparse.pages.head_patterns import HeadPattern, HeadPatterns
from vllm_sparse.prefill.attend import SparsePrefill

QUERIES = 64
"""Queries of a chunk that are measured, evenly spread."""
LEAST_SHARE, LARGEST_SHARE = 0.25, 2.0
"""Least and largest budget of a head relative to the mean; every page table is as wide as the largest."""


@dataclass
class MeasuredDecode(SparsePrefill):
    """A layer's chunks, attended densely; some of their queries are taken for steps of decode."""

    most_pages: int = 0
    """Pages of the largest budget; contexts up to it are not measured, as no head would have to choose."""
    everything: HeadPatterns | None = None
    mass: torch.Tensor | None = None
    """float64 [kv_heads, most_pages]: exact mass of the pages that decode attends to anyway, then that of the
    others from the largest on, summed over queries."""
    queries: int = 0

    @classmethod
    def around(cls, prefill: SparsePrefill, kv_heads: int, most_tokens: int) -> MeasuredDecode:
        """A layer's ``prefill`` by ``vertical_slash``, measured for budgets up to ``most_tokens``."""
        page_size, device = prefill.buffers.page_size, prefill.buffers.head_pages.device
        pattern = [HeadPattern(top_p=1.0)] * prefill.buffers.q_heads
        measured = cls(
            **{field.name: getattr(prefill, field.name) for field in fields(SparsePrefill)},
            most_pages=most_tokens // page_size,
            everything=HeadPatterns.of(pattern, page_size, device),
        )
        measured.mass = torch.zeros(kv_heads, measured.most_pages, dtype=torch.float64, device=device)
        return measured

    def attend(self, q, kv, block_table, chunk, out):
        self.policy.patterns = self.everything
        super().attend(q, kv, block_table, chunk, out)
        kv_heads, head_dim, page_size = kv.shape[1], q.shape[-1], self.buffers.page_size
        blocks = block_table[chunk.request, : chunk.num_pages(page_size)].long()
        keys = kv[blocks, :, :page_size, :head_dim].transpose(0, 1).flatten(1, 2).float()
        for number in range(QUERIES):
            token = chunk.num_tokens * (number + 1) // QUERIES - 1
            seq_len = chunk.first_position + token + 1
            pages = -(-seq_len // page_size)
            if pages <= self.most_pages:
                continue
            heads = q[chunk.first_token + token].float().view(kv_heads, -1, head_dim) * self.geometry.scale
            weights = (heads @ keys[:, :seq_len].transpose(1, 2)).softmax(-1).mean(1)
            mass = (
                torch.nn.functional.pad(weights, (0, -seq_len % page_size)).unflatten(1, (pages, page_size)).sum(2)
            )
            rank = mass.clone()
            rank[:, : self.selection.sink_pages] = float("inf")
            rank[:, max(0, min(seq_len - self.selection.window_tokens, seq_len - 1)) // page_size :] = float("inf")
            self.mass += mass.gather(1, rank.topk(self.most_pages).indices)
            self.queries += 1

    def take(self) -> dict:
        """The sums since the last time, as plain data; waits for the device."""
        found = {"mass": self.mass.tolist(), "queries": self.queries, "page_size": self.buffers.page_size}
        self.mass.zero_()
        self.queries = 0
        return found


@dataclass
class PageMasses:
    """The mass that a head gains with each further page, a mean over queries."""

    layers: list[int]
    mass: torch.Tensor
    """float64 [layers, kv_heads, pages]: falling along a row, past the pages that are attended to anyway."""
    page_size: int

    @classmethod
    def of_passages(cls, passages: list[list[dict]], kv_heads: int) -> PageMasses:
        """The mean over passages of what the workers of an engine took.

        A tensor-parallel rank has a slice of the heads, or a copy of one where there are fewer heads than ranks;
        a pipeline rank has some of the layers.
        """
        mass, queries, page_size = {}, {}, 0
        for workers in passages:
            rows: dict[int, list[torch.Tensor]] = {}
            for worker in sorted(workers, key=lambda worker: worker["rank"]):
                for name, found in worker["layers"].items():
                    rows.setdefault(int(name), []).append(torch.tensor(found["mass"], dtype=torch.float64))
                    queries[int(name), id(workers)] = found["queries"]
                    page_size = found["page_size"]
            for layer, parts in rows.items():
                heads = parts[0] if len(parts[0]) == kv_heads else torch.cat(parts)
                mass[layer] = mass.get(layer, 0) + heads[:: len(heads) // kv_heads]
        layers = sorted(mass)
        counts = [sum(n for (of, _), n in queries.items() if of == layer) for layer in layers]
        return cls(layers, torch.stack([mass[n] / c for n, c in zip(layers, counts, strict=True)]), page_size)

    def from_layer(self, first_layer: int) -> PageMasses:
        kept = [place for place, layer in enumerate(self.layers) if layer >= first_layer]
        return PageMasses([self.layers[place] for place in kept], self.mass[kept], self.page_size)

    def choose(self, budget_pages: int, least_pages: int) -> torch.Tensor:
        """int64 [layers, kv_heads]: budgets with a mean of ``budget_pages`` that hold the most mass together.

        One more page adds less and less to a head, so the pages that add most, whichever head's, are the best.
        """
        least = min(budget_pages, max(least_pages, -int(-LEAST_SHARE * budget_pages // 1)))
        more = self.mass[..., least:]
        spare = (budget_pages - least) * more[..., 0].numel()
        given = torch.zeros(more.numel(), dtype=torch.int64)
        given[more.flatten().topk(spare).indices] = 1
        return least + given.view(more.shape).sum(-1)

    def held(self, pages: torch.Tensor) -> torch.Tensor:
        """float64 [layers, kv_heads]: share of the attention on the best ``pages`` [layers, kv_heads]."""
        return self.mass.cumsum(-1).gather(-1, pages[..., None] - 1)[..., 0]

    def table(self, pages: torch.Tensor, num_layers: int) -> BudgetTable:
        rows: list[tuple[float, ...] | None] = [None] * num_layers
        shares = (pages / pages.double().mean()).tolist()
        for layer, row in zip(self.layers, shares, strict=True):
            rows[layer] = tuple(round(share, 4) for share in row)
        return BudgetTable(tuple(rows))
