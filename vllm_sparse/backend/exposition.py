"""``vllm:sparse_*`` of ``/metrics``: how counts of workers get to the API server, and what it makes of them.

    worker            ``metrics.recent``: totals as the device had them a second ago, copied without a wait
      ^ |  collective_rpc of vLLM's executor, not waited for
    engine core       :func:`counts_of_workers`: answers with what came back, and asks again
      ^ |  utility call of vLLM's client, one a second
    API server        :func:`poll`: merges the ranks of each engine and adds what is new to Prometheus' counters

No step takes part. Of several API servers the first one asks: vLLM has them share their counters.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge

from vllm_sparse.backend import compat

logger = logging.getLogger("vllm.vllm_sparse")

PREFIX = "vllm:sparse_"
POLL_SECONDS = 1.0
"""From one poll to the next. What is counted shows up two or three polls later."""
ANSWER_SECONDS = 60.0
"""After which an engine is asked anew: it is in a long step, or was taken away."""


@dataclass(frozen=True)
class Metric:
    """One of ``/metrics``, a counter where it is no gauge."""

    name: str
    """After :data:`PREFIX`; Prometheus appends ``_total`` to that of a counter."""
    text: str
    labels: tuple[str, ...] = ()
    """Beside stock's ``model_name`` and ``engine``."""
    gauge: bool = False
    shared: bool = False
    """All ranks that count it count the same; else each has a part, and parts are summed."""

    @property
    def exposed(self) -> str:
        """The name of its series."""
        return PREFIX + self.name + ("" if self.gauge else "_total")


METRICS = (
    Metric(
        "attention_layers", "Attention layers, by how they run and why.", ("state", "reason"), gauge=True,
    ),
    Metric(
        "decode_attended_tokens",
        "Tokens that query tokens of decode rows attended to, in one sparse layer and head.", shared=True,
    ),
    Metric("decode_context_tokens", "Tokens in the contexts of these query tokens.", shared=True),
    Metric("decode_rows", "Requests in decode steps, added up over steps.", shared=True),
    Metric(
        "dense_decode_rows", "Those of them that attended to their whole context, by reason.", ("reason",),
        shared=True,
    ),
    Metric(
        "steps", "Steps with rows of a phase, by whether any of them was attended sparsely.",
        ("phase", "attention"), shared=True,
    ),
    Metric(
        "prefill_attended_pairs",
        "Pairs of query and key that sparse prefill attended, over all sparse layers and query heads.",
    ),
    Metric("prefill_context_pairs", "Pairs of query and key that dense prefill would have attended there."),
    Metric(
        "recall_mass", "Shares of the attention mass that chosen pages held, added up over samples.", ("layer",),
    ),
    Metric("recall_samples", "Samples of the recall monitor, one a KV head.", ("layer",)),
    Metric("hot_set_lookups", "Head pages that decode steps looked for in the hot set."),
    Metric("hot_set_hits", "Head pages that were there."),
    Metric("host_read_bytes", "K and V read from the host, by the phase that needed them.", ("phase",)),
    Metric("host_pool_bytes", "Memory of the host pool.", gauge=True),
    Metric("host_pool_used_bytes", "What of it holds tokens of requests or of the prefix cache.", gauge=True),
)  # fmt: skip


# The engine core


def counts_of_workers(core: Any) -> dict | None:
    """What each worker had counted when this was called before, and ask them again; waits for no step.

    Args:
        core: an ``EngineCore``, between two of its steps.

    Returns:
        ``usage``, the share of KV blocks in use, and ``workers``, a list of :func:`vllm_sparse.metrics.recent`;
        None before the workers' first answer.
    """
    asked = getattr(core, "sparse_asked", None)
    # Answers come in the order of calls: behind a step that still runs there is none yet.
    if asked is not None and (asked.done() or not core.batch_queue):
        core.sparse_workers, asked = asked.result(), None
    if asked is None:
        core.sparse_asked = core.model_executor.collective_rpc("sparse_recent", non_block=True)
    if not hasattr(core, "sparse_workers"):
        return None
    return {"usage": core.scheduler.get_kv_cache_usage(), "workers": core.sparse_workers}


# The API server


def merged(workers: Iterable[list], usage: float) -> dict[tuple[str, ...], float]:
    """Counts of an engine's workers as those of the engine, by name and values of labels."""
    found: dict[tuple[str, ...], float] = {}
    shared = {metric.name for metric in METRICS if metric.shared}
    for name, labels, value in (sample for worker in workers for sample in worker):
        key, before = (name, *labels), found.get((name, *labels), 0)
        found[key] = max(before, value) if name in shared else before + value
    pool = found.get(("host_pool_bytes",))
    if pool is not None:
        found["host_pool_used_bytes",] = pool * usage
    return found


class Publisher:
    """Keeps Prometheus' metrics of this process at what engines have counted."""

    def __init__(self, model_name: str):
        self.model_name = model_name
        for collector in list(REGISTRY._collector_to_names):  # of an engine before this one
            if getattr(collector, "_name", "").startswith(PREFIX):
                REGISTRY.unregister(collector)
        self._metrics: dict[str, Counter | Gauge] = {}
        for metric in METRICS:
            name, labels = PREFIX + metric.name, ("model_name", "engine", *metric.labels)
            if metric.gauge:  # of several API servers only one sets it
                self._metrics[metric.name] = Gauge(name, metric.text, labels, multiprocess_mode="mostrecent")
            else:
                self._metrics[metric.name] = Counter(name, metric.text, labels)
        self._published: dict[tuple, float] = {}

    def publish(self, engine: int, counts: dict[tuple[str, ...], float]) -> None:
        """Show what :func:`merged` gives for an engine; a count that has fallen began anew."""
        for (name, *labels), value in counts.items():
            key = (name, str(engine), *labels)
            shown = self._metrics[name].labels(self.model_name, *key[1:])
            if isinstance(shown, Gauge):
                shown.set(value)
                continue
            before = self._published.get(key, 0)
            shown.inc(value - before if value >= before else value)
            self._published[key] = value


async def poll(client: Any, model_name: str) -> None:
    """Publish what the engines of ``client``, an ``AsyncMPClient``, have counted, until it is cancelled.

    Where an engine cannot answer, metrics stop there and say so; serving goes on.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    publisher = Publisher(model_name)

    async def ask(engine: bytes) -> None:
        call = client._call_utility_async("sparse_counts", engine=engine)
        try:
            counts = await asyncio.wait_for(call, ANSWER_SECONDS)
        except asyncio.TimeoutError:
            return
        if counts is not None:
            publisher.publish(int.from_bytes(engine, "little"), merged(**counts))

    try:
        while True:
            await asyncio.gather(*(ask(engine) for engine in client.core_engines))
            await asyncio.sleep(POLL_SECONDS)
    except EngineDeadError:
        return  # vLLM says so, and ends
    except Exception as error:
        logger.warning(
            "sparse attention: %s* of /metrics stay as they are from now on: %s: %s",
            PREFIX, type(error).__name__, error,
        )  # fmt: skip


def install() -> None:
    """Let engine cores tell counts, and API servers ask for them."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore

    EngineCore.sparse_counts = counts_of_workers
    run_output_handler = AsyncLLM._run_output_handler

    @functools.wraps(run_output_handler)
    def _run_output_handler(self):
        starts = self.output_handler is None
        run_output_handler(self)
        config, shows = self.vllm_config, self.logger_manager is not None  # not with --disable-log-stats
        if starts and shows and self.engine_core.client_index == 0 and compat.asks_for_sparse(config):
            # It must not hold ``self``, which vLLM wants collected, and ends with vLLM's own task.
            polls = asyncio.create_task(poll(self.engine_core, config.model_config.served_model_name))
            self.output_handler.add_done_callback(lambda _: polls.cancel())

    AsyncLLM._run_output_handler = _run_output_handler
