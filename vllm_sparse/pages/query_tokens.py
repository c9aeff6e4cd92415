"""QueryTokens: how many query tokens the requests of a decode step have, and where they are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class QueryTokens:
    """One query token per request, or with drafts to verify up to ``most``: the last token and its drafts.

    Pages are chosen once for all tokens of a request, by their mean query, which costs what one token does; each
    token attends to the chosen tokens up to itself. Scores by key ranges are linear in the query, so these are
    means of the tokens' scores. Sketches, whose scores are not, rank a page that one token alone looks for lower.
    """

    most: int = 1
    """Most tokens of a request, the same in every step with drafts of an engine."""
    starts: torch.Tensor | None = None
    """int32 [num_reqs + 1]: the first token of each request, and the number of all; None: each has one."""

    def of_requests(self, rows: slice) -> QueryTokens:
        """Those of some requests, among the tokens of all."""
        return self if self.starts is None else QueryTokens(self.most, self.starts[rows.start : rows.stop + 1])

    def spans(self, num_reqs: int) -> list[tuple[int, int]]:
        """First token of each request and how many it has; waits for the device."""
        if self.starts is None:
            return [(request, 1) for request in range(num_reqs)]
        starts = self.starts[: num_reqs + 1].tolist()
        return [(first, end - first) for first, end in pairwise(starts)]


ONE = QueryTokens()
