"""Candidates, what was measured of them, and the choice for each head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.config import SparseConfig
from vllm_sparse.pages.head_patterns import HeadPattern
from vllm_sparse.prefill.patterns import PatternTable

FORCED_TOKENS = 100
"""Diagonals of MInference's that are the nearest ones, whatever the estimate says."""
MINFERENCE = ((30, 800), (100, 800), (500, 700), (1000, 4096), (3500, 100))
"""(columns, diagonals) that MInference's released search tries for a vertical-slash head."""
A_SHAPE_TOKENS = 1024
"""Window of MInference's A-shape; its first tokens are this project's sinks."""
TOP_PS = (0.9, 0.95, 0.98, 0.99)
"""Shares of the estimated attention, as in FlexPrefill (Lai et al., arXiv 2502.20766)."""
CANDIDATES = (
    SparseConfig().uniform_pattern,
    *(HeadPattern(top_p=share) for share in TOP_PS if share != SparseConfig.prefill_top_p),
    HeadPattern(recent_tokens=A_SHAPE_TOKENS),
    *(HeadPattern(columns, diagonals - FORCED_TOKENS, FORCED_TOKENS) for columns, diagonals in MINFERENCE),
)
"""Patterns tried in every head; the first is what all heads have without tuned patterns."""


@dataclass
class Measurement:
    """Sums over chunks that ran sparse; heads are all of the model, layers those that were measured."""

    layers: list[int]
    error: torch.Tensor
    """float64 [layers, candidates, q_heads]: squared distance from the dense output."""
    norm: torch.Tensor
    """float64 [layers, q_heads]: squared dense output."""
    pairs: torch.Tensor
    """float64 [layers, candidates, q_heads]: (query, key) pairs attended."""
    causal_pairs: torch.Tensor
    """float64 [layers]: pairs of dense attention, per head."""

    @classmethod
    def of_workers(cls, workers: list[dict], q_heads: int) -> Measurement:
        """The measurement that the workers of an engine took (:class:`~vllm_sparse.tools.tune.worker.TuneWorker`).

        A tensor-parallel rank has a slice of the heads, a pipeline rank some of the layers.
        """
        found: dict[int, list] = {}
        for worker in sorted(workers, key=lambda worker: worker["rank"]):
            for layer, sums in worker["layers"].items():
                found.setdefault(int(layer), []).append(sums)
        layers = sorted(found)

        def heads(name: str) -> torch.Tensor:
            # A layer that is not split has all heads on each rank.
            rows = [torch.cat([torch.tensor(sums[name]) for sums in found[n]], -1)[..., :q_heads] for n in layers]
            return torch.stack(rows).double()

        causal = torch.tensor([found[n][0]["causal_pairs"] for n in layers]).double()
        return cls(layers, heads("error"), heads("norm"), heads("pairs"), causal)

    @classmethod
    def total(cls, parts: list[Measurement]) -> Measurement:
        """The sum of measurements of the same layers and candidates."""
        return cls(
            parts[0].layers, sum(part.error for part in parts), sum(part.norm for part in parts),
            sum(part.pairs for part in parts), sum(part.causal_pairs for part in parts),
        )  # fmt: skip

    def relative_error(self) -> torch.Tensor:
        """Relative L2 error of the output: [layers, candidates, q_heads]."""
        return (self.error / self.norm[:, None].clamp(min=1e-30)).sqrt()

    def choose(self, tolerance: float) -> torch.Tensor:
        """int64 [layers, q_heads]: the candidate with fewest pairs within ``tolerance``, else with least error."""
        relative = self.relative_error()
        good = relative <= tolerance
        cheapest = self.pairs.masked_fill(~good, float("inf")).argmin(1)
        return torch.where(good.any(1), cheapest, relative.argmin(1))

    def table(self, choices: torch.Tensor, num_layers: int) -> PatternTable:
        rows: list[tuple[int, ...] | None] = [None] * num_layers
        for layer, row in zip(self.layers, choices.tolist(), strict=True):
            rows[layer] = tuple(row)
        return PatternTable(CANDIDATES, tuple(rows))

    def cost(self, choices: torch.Tensor, first_layer: int, tolerance: float) -> Cost:
        """The cost of ``choices`` [layers, q_heads] in the layers from ``first_layer`` on."""
        counted = torch.tensor([layer >= first_layer for layer in self.layers])

        def chosen(sums: torch.Tensor) -> torch.Tensor:
            return sums.gather(1, choices[:, None])[:, 0][counted]

        causal = self.causal_pairs[counted].sum() * choices.shape[1]
        return Cost(
            density=(chosen(self.pairs).sum() / causal).item(),
            error=(chosen(self.error).sum() / self.norm[counted].sum()).sqrt().item(),
            heads_over=int((chosen(self.relative_error()) > tolerance).sum()),
            heads=int(counted.sum()) * choices.shape[1],
        )


@dataclass(frozen=True)
class Cost:
    density: float
    """Share of the causal (query, key) pairs that are attended."""
    error: float
    """Relative L2 error of the output of all heads together."""
    heads_over: int
    """Heads whose own error is above the tolerance."""
    heads: int
