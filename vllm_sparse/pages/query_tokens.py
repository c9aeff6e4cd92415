"""QueryTokens: how many query tokens the requests of a decode step have, and where they are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

MOST_ASKED = 4
"""Query tokens of a request that choose its pages, at most: neighbours mostly want the same ones, and each takes a
row of scores for every query head."""


@dataclass(frozen=True)
class QueryTokens:
    """One query token per request, or with drafts to verify up to ``most``: the last token and its drafts.

    Pages are chosen once for all tokens of a request, by as many of them as :attr:`asked` says, the first and the
    last among them; each token attends to the chosen tokens up to itself.
    """

    most: int = 1
    """Most tokens of a request, the same in every step with drafts of an engine."""
    starts: torch.Tensor | None = None
    """int32 [num_reqs + 1]: the first token of each request, and the number of all; None: each has one."""

    @property
    def asked(self) -> int:
        """Rows of scores for each query head."""
        return min(self.most, MOST_ASKED)

    def of_requests(self, rows: slice) -> QueryTokens:
        """Those of some requests, among the tokens of all."""
        return self if self.starts is None else QueryTokens(self.most, self.starts[rows.start : rows.stop + 1])

    def spans(self, num_reqs: int) -> list[tuple[int, int]]:
        """First token of each request and how many it has; waits for the device."""
        if self.starts is None:
            return [(request, 1) for request in range(num_reqs)]
        starts = self.starts[: num_reqs + 1].tolist()
        return [(first, end - first) for first, end in pairwise(starts)]

    def asked_of(self, first: int, count: int) -> list[int]:
        """The tokens by which pages are chosen for a request of ``count`` tokens from ``first`` on; evenly spread,
        and some more than once where there are fewer."""
        rows = self.asked
        return [first + (row * (count - 1) + (rows - 1) // 2) // max(rows - 1, 1) for row in range(rows)]


ONE = QueryTokens()
