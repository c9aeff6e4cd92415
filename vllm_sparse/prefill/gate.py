"""ChunkGate: which chunks ``prefill_policy: auto`` lets choose pages, without a wait for the device."""

from __future__ import annotations

import logging

from vllm_sparse.pages.query_blocks import QueryBlocks
from vllm_sparse.prefill.buffers import PrefillBuffers
from vllm_sparse.reports import Recent

logger = logging.getLogger("vllm.vllm_sparse")

AUTO = "auto"
"""The value of ``prefill_policy`` that asks the gate."""
LEAST_PRODUCTS = 1 << 36
"""Products of a channel of a query and of a key in a layer of a chunk, over all heads, up to which it runs dense:
0.4 ms of FlashAttention-3 on an H100, twice what the launches of a choice take."""
MOST_CHUNKS = 4
"""Chunks of a step that choose, the longest ones: each is attended by launches of its own."""
MOST_DENSITY = 0.6
"""Share of the causal pairs that a chunk may attend to before it is no faster than dense attention."""
REST_STEPS, MOST_REST_STEPS = 64, 1024
"""Steps that run dense after chunks that were too dense, before one looks again: twice as many after each such
look, so that few requests pay where nothing is to be gained. A look at chunks that kept all pairs made the prefill
of 32,768 tokens 9 % longer on an H200."""


class ChunkGate:
    """Lets chunks choose pages that are long enough, unless those before them kept too many.

    What those kept is counted on the device, and known here a step later or more.
    """

    def __init__(self, buffers: PrefillBuffers):
        self.channels = buffers.q_heads * buffers.pooled.shape[1]
        self._recent = Recent(buffers.counters)
        self._seen = [0, 0]
        self._resting, self._rest = 0, REST_STEPS

    def admits(self, chunks: list[QueryBlocks]) -> list[QueryBlocks]:
        """Those of a step's ``chunks`` that run sparse."""
        longest = sorted(chunks, key=lambda chunk: chunk.pairs, reverse=True)[:MOST_CHUNKS]
        chunks = [chunk for chunk in chunks if chunk in longest and chunk.pairs * self.channels > LEAST_PRODUCTS]
        if not chunks:
            return []
        self._look()
        if self._resting:
            self._resting -= 1
            return []
        return chunks

    def _look(self) -> None:
        """Rest where chunks since the last look have kept too many pairs."""
        before, self._seen = self._seen, self._recent.look()
        attended, causal = (new - old for new, old in zip(self._seen, before, strict=True))
        if causal <= 0:  # nothing is known of other steps, or counts began anew
            return
        if attended <= MOST_DENSITY * causal:
            self._rest = REST_STEPS
            return
        self._resting, self._rest = self._rest, min(2 * self._rest, MOST_REST_STEPS)
        logger.info(
            "sparse attention: prefill kept %.0f%% of all pairs, so the next %d steps of it are dense",
            100 * attended / causal, self._resting,
        )  # fmt: skip
