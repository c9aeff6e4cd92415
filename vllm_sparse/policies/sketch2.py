"""Sketch2: as sketch, with 2-bit codes."""

from __future__ import annotations

from vllm_sparse.policies.sketch import Sketch


class Sketch2(Sketch):
    """Four levels for each channel of a key instead of two; see :class:`Sketch`."""

    summary = "sketch2"
