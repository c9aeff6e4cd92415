"""Counters of engines: what ran sparse, what ran dense and why, and how much of the context was attended."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from typing import Any

import torch

from vllm_sparse.decode.recall_monitor import RecallMonitor
from vllm_sparse.offload.store import OffloadStore
from vllm_sparse.pages.decode_plan import COUNTERS
from vllm_sparse.prefill.buffers import PrefillBuffers
from vllm_sparse.reports import Totals
from vllm_sparse.support import Treatment

logger = logging.getLogger("vllm.vllm_sparse")

decided: weakref.WeakSet = weakref.WeakSet()
"""Attention layers of this process about which ``support`` has decided, of all engines. A snapshot reads off each
what was decided and what counts its engine's steps; nothing is counted when a layer is built, which may happen
twice."""


class AttendedTokens(Totals):
    """Tokens attended, tokens in the contexts, and what else these steps count; ``what`` names them in the log."""

    def __init__(self, counters: torch.Tensor, what: str = "decode steps"):
        super().__init__(counters)
        self.what = what

    def _log(self, copied):
        attended, context = copied[:2].tolist()
        if context <= self._logged:
            return
        self._logged = context
        logger.info(
            "sparse attention: attended %d of %d tokens (%.1f%%) in %s so far",
            attended, context, 100 * attended / context, self.what,
        )  # fmt: skip


class HotSetCounts(Totals):
    """Head pages that decode steps looked for, fetched into the hot set, and read on the host in place."""

    def __init__(self, store: OffloadStore):
        super().__init__(store.lookups.counters)
        self.head_page_bytes = store.shape.host_head_page_bytes
        self.pool_bytes, self.contexts = store.pool.num_bytes, store.contexts
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.steps = self.contexts.pages_read = 0

    @property
    def context_bytes(self) -> int:
        """What prefill has read back of contexts."""
        return self.contexts.pages_read * self.contexts.hosts[0].shape[1] * self.head_page_bytes

    def step(self) -> None:
        self.steps += 1
        super().step()

    def _log(self, copied):
        looked_up, fetched, in_place = copied.tolist()
        if looked_up <= self._logged:
            return
        self._logged = looked_up
        moved = fetched + in_place
        logger.info(
            "sparse attention: %.1f%% of the chosen head pages were in the hot set; %.2f MiB a decode step came "
            "from the host (%d head pages in place)",
            100 * (1 - moved / looked_up), moved * self.head_page_bytes / 2**20 / max(1, self.steps), in_place,
        )  # fmt: skip


class DraftSteps:
    """Steps with drafts that are verified densely, as they lie behind prompts: counted on the host."""

    def __init__(self) -> None:
        self.reset()

    def add(self, rows: int, tokens: int, context_tokens: int) -> None:
        """Count a step that verifies drafts.

        Args:
            rows: requests with drafts.
            tokens: queries of the step, drafts and the token before them.
            context_tokens: in the contexts of these requests.
        """
        if not self.steps:
            logger.info(
                "sparse attention: some drafts are verified densely: other layers of the model made vLLM put them "
                "behind prompts in a step"
            )
        self.steps += 1
        self.rows += rows
        self.tokens += tokens
        self.context_tokens += context_tokens

    def reset(self) -> None:
        self.steps = self.rows = self.tokens = self.context_tokens = 0


class EngineCounts:
    """What one engine's steps add up to in this process; shared by its layers."""

    def __init__(self, device: torch.device):
        self.decode = AttendedTokens(torch.zeros(len(COUNTERS), dtype=torch.int64, device=device))
        self.prefill: list[AttendedTokens] = []
        """One for each shape of layers that has buffers for sparse prefill."""
        self.monitors: list[RecallMonitor] = []
        """One for each workspace, where ``recall_monitor_every_steps`` asks for them."""
        self.drafts = DraftSteps()
        self.prefill_steps = self.sparse_prefill_steps = 0
        """Steps with prefill chunks, and those of them with one that is attended sparsely."""
        self.hot: HotSetCounts | None = None
        """None without offload."""

    def follow(self, prefill: PrefillBuffers | None, monitor: RecallMonitor | None) -> None:
        """Report what a workspace of sparse layers counts, once for all layers that share it."""
        if prefill is not None and all(one.totals is not prefill.counters for one in self.prefill):
            what = "(query, key) pairs of sparse prefill"
            self.prefill.append(AttendedTokens(prefill.counters, what))
        if monitor is not None and all(one is not monitor for one in self.monitors):
            self.monitors.append(monitor)

    def reset(self) -> None:
        """Forget everything counted so far."""
        for counts in (self.decode, *self.prefill, *self.monitors, self.drafts):
            counts.reset()
        self.prefill_steps = self.sparse_prefill_steps = 0
        if self.hot is not None:
            self.hot.reset()


def _layers_of(worker: Any) -> list:
    layers = list(decided)
    if worker is None:
        return layers
    context = worker.vllm_config.compilation_config.static_forward_context
    own = {id(layer) for layer in context.values()}
    return [layer for layer in layers if id(layer) in own]


def _counts_of(layers: list) -> list[EngineCounts]:
    counts = (getattr(getattr(layer, "impl", None), "counts", None) for layer in layers)
    return list({id(one): one for one in counts if one is not None}.values())


def snapshot(worker: Any = None) -> dict:
    """Counts as plain data; waits for the device.

    Args:
        worker: of the engine whose counts are wanted, as ``collective_rpc`` gives it; None: all engines of this
            process.
    """
    layers = _layers_of(worker)
    engines = _counts_of(layers)
    by_treatment = {
        treatment: Counter(
            layer.sparse_support.reason for layer in layers if layer.sparse_support.treatment is treatment
        )
        for treatment in Treatment
    }
    decode = [engine.decode.read()[:2] for engine in engines]
    prefill = [tracker.read() for engine in engines for tracker in engine.prefill]
    drafts = [engine.drafts for engine in engines]
    return {
        "sparse_layers": by_treatment[Treatment.SPARSE].total(),
        "dense_layers": dict(by_treatment[Treatment.DENSE]),
        "stock_layers": dict(by_treatment[Treatment.STOCK]),
        "attended_tokens": sum(attended for attended, _ in decode),
        "context_tokens": sum(context for _, context in decode),
        "dense_verification_steps": sum(counts.steps for counts in drafts),
        "dense_verification_tokens": sum(counts.tokens for counts in drafts),
        "dense_verification_context_tokens": sum(counts.context_tokens for counts in drafts),
        "recall_by_layer": [monitor.read() for engine in engines for monitor in engine.monitors],
        "prefill_attended_pairs": sum(attended for attended, _ in prefill),
        "prefill_causal_pairs": sum(causal for _, causal in prefill),
        **_hot_set([engine.hot for engine in engines if engine.hot is not None]),
    }


def _hot_set(hot_sets: list[HotSetCounts]) -> dict:
    if not hot_sets:
        return {}
    looked_up, fetched, in_place = (
        sum(numbers) for numbers in zip(*(hot.read() for hot in hot_sets), strict=True)
    )
    return {
        "head_pages_looked_up": looked_up,
        "head_pages_fetched": fetched,
        "head_pages_in_place": in_place,
        "head_page_bytes": hot_sets[-1].head_page_bytes,
        "decode_steps": sum(hot.steps for hot in hot_sets),
    }


def recent(worker: Any) -> list[tuple[str, list[str], float]]:
    """Counts of a worker's engine as they were when this was last called; never waits for the device.

    Returns:
        Name, values of labels and value of each of :data:`vllm_sparse.backend.exposition.METRICS` that it counts.
    """
    if not getattr(worker, "sparse_asleep", None):  # else the counters' memory is gone
        counted: Counter = Counter()
        layers = _layers_of(worker)
        parallel = worker.vllm_config.parallel_config
        ranks_of_stage = parallel.world_size // parallel.pipeline_parallel_size
        for layer in layers if worker.rank % ranks_of_stage == 0 else ():  # the stage's other ranks have the same
            decision = layer.sparse_support
            counted["attention_layers", decision.treatment.value, decision.reason] += 1
        configs = [layer.impl.config for layer in layers if hasattr(layer.impl, "counts")]
        chooses = any(config.decode_policy != "dense" for config in configs)
        for engine in _counts_of(layers):
            counted.update(_recent_of(engine, "short" if chooses else "policy"))
        worker.sparse_counted = [(name, labels, value) for (name, *labels), value in counted.items()]
    return getattr(worker, "sparse_counted", [])


def _recent_of(engine: EngineCounts, why_short: str) -> dict[tuple[str, ...], float]:
    """What :func:`recent` counts of an engine, by name and values of labels."""
    decode = dict(zip(COUNTERS, engine.decode.recent(), strict=True))
    kinds = ("sparse_rows", "short_rows", "covered_rows", "exact_rows")
    no_room = decode["rows"] - sum(decode[kind] for kind in kinds)
    found = {
        ("decode_attended_tokens",): decode["attended_tokens"],
        ("decode_context_tokens",): decode["context_tokens"],
        ("decode_rows",): decode["rows"] + engine.drafts.rows,
        ("dense_decode_rows", why_short): decode["short_rows"],
        ("dense_decode_rows", "budget"): decode["covered_rows"],
        ("dense_decode_rows", "request"): decode["exact_rows"],
        ("dense_decode_rows", "scores"): no_room,
        ("dense_decode_rows", "draft"): engine.drafts.rows,
        ("steps", "decode", "sparse"): decode["sparse_steps"],
        ("steps", "decode", "dense"): decode["steps"] - decode["sparse_steps"],
        ("steps", "prefill", "sparse"): engine.sparse_prefill_steps,
        ("steps", "prefill", "dense"): engine.prefill_steps - engine.sparse_prefill_steps,
    }
    pairs = [tracker.recent() for tracker in engine.prefill]
    if pairs:
        found["prefill_attended_pairs",] = sum(attended for attended, _ in pairs)
        found["prefill_context_pairs",] = sum(causal for _, causal in pairs)
    for monitor in engine.monitors:
        for layer, (share, samples) in monitor.recent().items():
            found["recall_mass", str(layer)], found["recall_samples", str(layer)] = share, samples
    if engine.hot is not None:
        looked_up, fetched, in_place = engine.hot.recent()
        found["hot_set_lookups",] = looked_up
        found["hot_set_hits",] = looked_up - fetched - in_place
        found["host_read_bytes", "decode"] = (fetched + in_place) * engine.hot.head_page_bytes
        found["host_read_bytes", "prefill"] = engine.hot.context_bytes
        found["host_pool_bytes",] = engine.hot.pool_bytes
    return found


def reset_counts(worker: Any) -> None:
    """Forget what an engine's steps have added up to so far."""
    for counts in _counts_of(_layers_of(worker)):
        counts.reset()


def reset() -> None:
    """Forget all engines of this process that were built so far."""
    decided.clear()
