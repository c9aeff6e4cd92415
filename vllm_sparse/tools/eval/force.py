"""ForcedTokens: decode steps that are fed a given text, whatever the model would have said.

vLLM computes log-probabilities before logits processors run, so the answer's ``logprobs`` are the
model's own, of the tokens that were forced.
"""

from __future__ import annotations

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

FORCED = "vllm_sparse_forced_tokens"
"""Key of ``SamplingParams.extra_args``: the token ids to say first, one per step."""


class ForcedTokens(LogitsProcessor):
    """A processor for vLLM's ``logits_processors``; requests without :data:`FORCED` are left alone."""

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool):
        self.rows: dict[int, tuple[list[int], list[int]]] = {}
        """Row of the batch -> tokens to say, and the list of tokens said, which vLLM extends."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.rows.pop(row, None)
        for row, params, _, said in batch_update.added:
            self.rows.pop(row, None)
            forced = (params.extra_args or {}).get(FORCED)
            if forced:
                self.rows[row] = (forced, said)
        for source, target, direction in batch_update.moved:
            moved, replaced = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self.rows[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (forced, said) in self.rows.items():
            if len(said) < len(forced):
                logits[row] = float("-inf")
                logits[row, forced[len(said)]] = 0.0
        return logits
