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
REST_STEPS = 64
"""Steps that run dense after chunks that were too dense, before one looks again."""
LOOK_LAYERS = 8
"""One layer in so many of a rank looks."""


class ChunkGate:
    """Lets chunks choose pages that are long enough, unless those before them kept too many.

    What those kept is counted on the device, and known here a step later or more. After a rest a chunk is dense
    and some layers count what it would keep: a prompt that keeps too much pays for a choice in them alone.
    """

    def __init__(self, buffers: PrefillBuffers):
        self.channels = buffers.q_heads * buffers.pooled.shape[1]
        self._recent = [Recent(buffers.counters), Recent(buffers.looks)]
        self._seen = [[0, 0], [0, 0]]
        self._resting, self._looking = 0, False

    def sort(
        self, chunks: list[QueryBlocks], can_look: bool = True
    ) -> tuple[list[QueryBlocks], list[QueryBlocks]]:
        """Those of a step's ``chunks`` that run sparse, and those that run dense and are looked at.

        Where chunks cannot be looked at they run sparse in their place.
        """
        longest = sorted(chunks, key=lambda chunk: chunk.pairs, reverse=True)[:MOST_CHUNKS]
        chunks = [chunk for chunk in chunks if chunk in longest and chunk.pairs * self.channels > LEAST_PRODUCTS]
        if not chunks:
            return [], []
        self._learn()
        if self._resting:
            self._resting -= 1
            self._looking = True
            return [], []
        if self._looking and can_look:
            return [], [chunk for chunk in chunks if chunk is longest[0]]
        return chunks, []

    def _learn(self) -> None:
        """Rest where chunks since the last time have kept, or would have, too many pairs."""
        before, self._seen = self._seen, [recent.look() for recent in self._recent]
        attended = causal = 0
        for old, new in zip(before, self._seen, strict=True):
            if new[1] > old[1]:  # else nothing is new, or counts began anew
                attended, causal = attended + new[0] - old[0], causal + new[1] - old[1]
        if attended > MOST_DENSITY * causal:
            self._resting = REST_STEPS
            logger.info(
                "sparse attention: prefill kept %.0f%% of all pairs, so the next %d steps of it are dense",
                100 * attended / causal, REST_STEPS,
            )  # fmt: skip
        elif causal:
            self._looking = False
