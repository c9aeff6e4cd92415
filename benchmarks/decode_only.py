"""Decode without prefill: requests whose prompts count as computed, over random keys, values and states.

How long a step takes depends on the lengths of contexts and not on what their pages hold: so 8 contexts of
131,072 tokens are timed in seconds, where computing their prompts first takes minutes.
"""

from __future__ import annotations

import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

FILL_TOKENS = 16384
STATE_SCALE = 0.1


class _PromptsComputed:
    """Takes all of a request's prompt but its last token, which gives the first logits, as computed."""

    def add_request(self, request) -> None:
        request.num_computed_tokens = request.num_prompt_tokens - 1
        super().add_request(request)


class DecodeOnlyScheduler(_PromptsComputed, Scheduler):
    """Where vLLM schedules a step after the one before has ended."""


class DecodeOnlyAsyncScheduler(_PromptsComputed, AsyncScheduler):
    """Where it schedules the next one meanwhile."""


class FillWorker:
    """vLLM mixes it into each of its workers (``worker_extension_cls``)."""

    def fill_new_requests(self) -> None:
        """From now on give requests random keys, values and states after their first step.

        That one attends to nothing: what the memory held before may be no numbers, and give no token.
        """
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            for tensor in tensors_of(layer):
                tensor.zero_()
        execute = self.model_runner.execute_model

        def execute_and_fill(scheduler_output, *args, **kwargs):
            # Not before it: vLLM clears blocks of hybrids when they come to a request.
            output = execute(scheduler_output, *args, **kwargs)
            for request in scheduler_output.scheduled_new_reqs:
                self._fill(request.block_ids)
            return output

        self.model_runner.execute_model = execute_and_fill

    def _fill(self, block_ids: tuple[list[int], ...]) -> None:
        """Fill a request's blocks of each group of layers."""
        layers = self.vllm_config.compilation_config.static_forward_context
        for group, blocks in zip(self.model_runner.kv_cache_config.kv_cache_groups, block_ids, strict=True):
            blocks = torch.tensor(blocks, device=self.device)
            offsets = torch.arange(group.kv_cache_spec.block_size, device=self.device)
            for name in group.layer_names:
                layer = layers[name]
                if hasattr(getattr(layer, "impl", None), "do_kv_cache_update"):
                    fill_attention(
                        layer, (blocks[:, None] * len(offsets) + offsets).flatten(), self.model_config.dtype
                    )
                else:
                    for state in tensors_of(layer):
                        state[blocks] = STATE_SCALE * torch.randn_like(state[blocks])


def tensors_of(layer) -> tuple[torch.Tensor, ...]:
    """What a layer keeps for its requests: a cache of keys and values, or its states; of other layers nothing."""
    kept = getattr(layer, "kv_cache", ())
    return (kept,) if isinstance(kept, torch.Tensor) else tuple(kept)


def fill_attention(layer, slots: torch.Tensor, dtype: torch.dtype) -> None:
    """Write random keys and values by the layer's own backend, with whatever it keeps beside them.

    Args:
        slots: [tokens], where in its cache.
    """
    if layer.impl.kv_sharing_target_layer_name is not None:
        return  # it reads what another layer writes
    for some in slots.split(FILL_TOKENS):
        shape = (2, len(some), layer.num_kv_heads, layer.head_size)
        key, value = torch.randn(shape, dtype=dtype, device=slots.device)
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, some)
