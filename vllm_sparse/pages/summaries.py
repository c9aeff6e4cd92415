"""What each page stores beside K and V for its policy, and the room it takes.

=============  =======================================================================================
``none``       nothing
``key_range``  the page's range of keys per channel, in int8 (:mod:`vllm_sparse.kernels.page_write`)
``sketch1``    every key in 1 bit per channel, 16 keys at a time (:mod:`vllm_sparse.kernels.sketch_write`)
``sketch2``    every key in 2 bits per channel, 16 keys at a time
=============  =======================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

TILE_TOKENS = 16
"""Keys that share the mean of a sketch; a larger page holds several sketches, each of one tile."""
SKETCH_BITS = {"sketch1": 1, "sketch2": 2}
SUMMARIES = ("none", "key_range", *SKETCH_BITS)


@dataclass(frozen=True)
class SketchLayout:
    """Where the parts of a tile's sketch lie, in bytes from its start.

    From 0 on there are ``2 * bits`` planes of ``width`` bytes, each with codes of ``8 / bits`` keys.
    """

    bits: int
    """Of one key's code in one channel."""
    width: int
    """Channels after rotation: the head size, padded to a power of two."""

    @classmethod
    def of(cls, summary: str, head_dim: int) -> SketchLayout:
        return cls(SKETCH_BITS[summary], max(32, 1 << (head_dim - 1).bit_length()))

    @property
    def noise(self) -> float:
        """Mean square of what a code loses of a normal variable, in units of the square of its scale."""
        return {1: 0.142, 2: 0.117}[self.bits]

    @property
    def planes(self) -> int:
        return TILE_TOKENS * self.bits // 8

    @property
    def mean(self) -> int:
        """int8 [width]."""
        return self.planes * self.width

    @property
    def scales(self) -> int:
        """bfloat16 [16], one per key."""
        return self.mean + self.width

    @property
    def mean_scale(self) -> int:
        """float32 [1]."""
        return self.scales + 2 * TILE_TOKENS

    @property
    def used_bytes(self) -> int:
        return self.mean_scale + 4

    @property
    def tile_bytes(self) -> int:
        """Bytes from one tile's sketch to the next, in whole pieces of 64, as memory is read."""
        return -(-self.used_bytes // 64) * 64


def summary_slots(summary: str, page_size: int, head_dim: int, item_bytes: int, least: int = 0) -> int:
    """Extra rows of ``2 * head_dim`` elements of ``item_bytes`` that a summary takes in each page and KV head.

    Not below ``least``: with K and V on the host a block holds nothing else, and vLLM counts blocks by bytes.

    Raises:
        ValueError: there is no such summary.
    """
    if summary not in SUMMARIES:
        raise ValueError(f"summary {summary!r}; allowed: {', '.join(SUMMARIES)}")
    if summary not in SKETCH_BITS:
        return max(least, 0 if summary == "none" else 1)
    sketch_bytes = page_size // TILE_TOKENS * SketchLayout.of(summary, head_dim).tile_bytes
    return -(-sketch_bytes // (2 * head_dim * item_bytes))


def summary_bytes_read(summary: str, page_size: int, head_dim: int, item_bytes: int) -> int:
    """Bytes of a page's summary that scoring reads, of each KV head."""
    if summary in SKETCH_BITS:
        return page_size // TILE_TOKENS * SketchLayout.of(summary, head_dim).used_bytes
    return 2 * head_dim if summary == "key_range" else 0
