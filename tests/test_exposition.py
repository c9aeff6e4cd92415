"""The way of ``vllm:sparse_*`` from the device to Prometheus' counters, piece by piece."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_sparse import metrics
from vllm_sparse.decode.recall_monitor import RecallMonitor
from vllm_sparse.pages.decode_plan import COUNTERS


@pytest.fixture(scope="module")
def exposition():
    pytest.importorskip("vllm")
    from vllm_sparse.backend import exposition

    yield exposition
    exposition.Publisher("gone")  # leaves no values behind


def exposed() -> dict[tuple[str, tuple], float]:
    """Values of this process's ``vllm:sparse_*``, by series and sorted labels without the model's name."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(REGISTRY).decode()):
        for sample in family.samples:
            if sample.name.startswith("vllm:sparse_") and not sample.name.endswith("_created"):
                labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
                found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


# Totals that are read without a wait


class Arrival:
    """A CUDA event whose copy arrives when a test says so."""

    arrived, recorded = True, 0

    def query(self) -> bool:
        return self.arrived

    def record(self) -> None:
        self.recorded += 1


def test_totals_are_those_of_the_copy_before_and_nothing_waits_for_one_under_way():
    totals = metrics.AttendedTokens(torch.zeros(2, dtype=torch.int64))
    totals.totals += torch.tensor([3, 5])
    assert totals.recent() == [3, 5], "on a CPU nothing is under way"
    totals._recent._arrival = arrival = Arrival()
    seen = []
    for arrived in (True, True, False, False, True, True):
        arrival.arrived = arrived
        seen.append(totals.recent()[0])
        totals.totals += 10
    assert seen == [0, 3, 3, 3, 13, 43] and arrival.recorded == 4
    totals.reset()
    assert totals.recent() == [0, 0] and totals.recent() == [0, 0], "what was copied before is forgotten too"


def test_few_layers_are_measured_spread_over_the_sparse_ones():
    monitor = RecallMonitor.allocate(1, 32, 4, 2, torch.device("cpu"))
    for most, expected in ((4, {5, 13, 20, 28}), (1, {17}), (0, set(range(2, 32))), (99, set(range(2, 32)))):
        monitor.measure([*range(2, 32), 32, None], most)  # a draft's layer, and one without a number
        assert monitor.measured == expected
    monitor.measure(range(2, 5), 2)
    monitor.sums[2] = torch.tensor([[1.5, 2.0], [0.5, 1.0]])
    assert monitor.recent() == {2: (2.0, 3.0), 4: (0, 0)}


def test_each_decode_row_is_sparse_or_dense_for_one_reason():
    counts = metrics.EngineCounts(torch.device("cpu"))
    numbers = {
        "rows": 16, "sparse_rows": 4, "short_rows": 3, "covered_rows": 2, "exact_rows": 6, "steps": 8,
        "sparse_steps": 3,
    }  # fmt: skip
    for name, number in numbers.items():
        counts.decode.totals[COUNTERS.index(name)] = number
    counts.drafts.add(rows=5, tokens=15, context_tokens=999)
    found = metrics._recent_of(counts, "short")
    dense = {key[1]: number for key, number in found.items() if key[0] == "dense_decode_rows"}
    assert dense == {"short": 3, "budget": 2, "request": 6, "scores": 1, "draft": 5}
    assert found["decode_rows",] == sum(dense.values()) + 4
    assert (found["steps", "decode", "sparse"], found["steps", "decode", "dense"]) == (3, 5)
    counts.reset()
    assert not any(metrics._recent_of(counts, "short").values())


# The engine core and the API server


class Answer:
    """What ``collective_rpc`` gives when it is not waited for."""

    def __init__(self, value):
        self.value, self.is_done = value, False

    def done(self) -> bool:
        return self.is_done

    def result(self):
        return self.value


def core_of(batch_queue):
    """An engine core whose workers answer 1, 2, 3, and the answers."""
    asked = []

    def collective_rpc(method, non_block):
        assert method == "sparse_recent" and non_block
        asked.append(Answer([len(asked) + 1]))
        return asked[-1]

    executor = SimpleNamespace(collective_rpc=collective_rpc)
    scheduler = SimpleNamespace(get_kv_cache_usage=lambda: 0.5)
    return SimpleNamespace(batch_queue=batch_queue, model_executor=executor, scheduler=scheduler), asked


def test_the_engine_core_gives_the_answer_before_and_waits_for_no_step(exposition):
    core, asked = core_of(batch_queue=["a step under way"])
    assert exposition.counts_of_workers(core) is None
    assert exposition.counts_of_workers(core) is None and len(asked) == 1, "an answer is still out"
    asked[0].is_done = True
    assert exposition.counts_of_workers(core) == {"usage": 0.5, "workers": [1]} and len(asked) == 2
    assert exposition.counts_of_workers(core)["workers"] == [1] and len(asked) == 2
    core.batch_queue.clear()  # idle: the workers have long answered
    assert exposition.counts_of_workers(core)["workers"] == [2] and len(asked) == 3


def test_ranks_are_merged_by_what_they_count(exposition):
    stage_0 = [("attention_layers", ["dense", "why"], 2), ("attention_layers", ["sparse", ""], 1)]
    stage_1 = [("attention_layers", ["sparse", ""], 3)]
    count = [("decode_rows", [], 7), ("steps", ["decode", "sparse"], 5)]
    late = [("decode_rows", [], 6), ("steps", ["decode", "sparse"], 5)]
    heads = [("recall_mass", ["4"], 1.5), ("hot_set_hits", [], 10), ("host_pool_bytes", [], 100)]
    found = exposition.merged([stage_0 + count + heads, late + heads, stage_1, []], usage=0.25)
    assert found == {
        ("attention_layers", "dense", "why"): 2, ("attention_layers", "sparse", ""): 4,
        ("decode_rows",): 7, ("steps", "decode", "sparse"): 5, ("recall_mass", "4"): 3.0,
        ("hot_set_hits",): 20, ("host_pool_bytes",): 200, ("host_pool_used_bytes",): 50,
    }  # fmt: skip


def test_counters_grow_by_what_is_new_of_each_engine(exposition):
    for _ in range(2):  # a second engine of a process begins at 0
        publisher = exposition.Publisher("tiny")
        for engine, rows, pool in ((0, 5, 10.0), (1, 2, 3.0), (0, 9, 8.0), (1, 2, 3.0), (0, 4, 8.0)):
            publisher.publish(engine, {("decode_rows",): rows, ("host_pool_bytes",): pool})
        assert exposed() == {
            ("vllm:sparse_decode_rows_total", (("engine", "0"),)): 13.0,  # 9, and 4 after the engine forgot
            ("vllm:sparse_decode_rows_total", (("engine", "1"),)): 2.0,
            ("vllm:sparse_host_pool_bytes", (("engine", "0"),)): 8.0,
            ("vllm:sparse_host_pool_bytes", (("engine", "1"),)): 3.0,
        }


class Client:
    """Three engines: one counts, one is in a long step at first, the third has nothing yet."""

    def __init__(self, ends_with: Exception):
        self.core_engines = [rank.to_bytes(2, "little") for rank in (0, 1, 258)]
        self.ends_with, self.asked = ends_with, 0

    async def _call_utility_async(self, method, engine):
        assert method == "sparse_counts"
        if engine == self.core_engines[0]:
            return None
        if engine == self.core_engines[1] and self.asked == 0:
            await asyncio.sleep(60)
        if engine == self.core_engines[2]:
            self.asked += 1
            if self.asked == 4:
                raise self.ends_with
        return {"usage": 0.0, "workers": [[("decode_rows", [], self.asked)]]}


@pytest.mark.parametrize("ends_with", ["a worker's error", "the engine's death"])
def test_polls_go_on_past_slow_engines_and_end_with_one_warning(exposition, monkeypatch, ends_with):
    from vllm.v1.engine.exceptions import EngineDeadError

    said = []
    monkeypatch.setattr(exposition, "POLL_SECONDS", 0)
    monkeypatch.setattr(exposition, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(exposition.logger, "warning", lambda text, *values: said.append(text % values))
    error = RuntimeError("no such pages") if ends_with.startswith("a") else EngineDeadError()
    asyncio.run(exposition.poll(Client(error), "tiny"))
    assert exposed() == {
        ("vllm:sparse_decode_rows_total", (("engine", "1"),)): 3.0,
        ("vllm:sparse_decode_rows_total", (("engine", "258"),)): 3.0,
    }
    assert len(said) == ends_with.startswith("a") and all("RuntimeError: no such pages" in line for line in said)


@pytest.mark.seam
@pytest.mark.parametrize("who", ["shows", "never asked", "no stats", "second server"])
def test_only_the_first_api_server_of_a_sparse_engine_polls(tiny, exposition, monkeypatch, who):
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_sparse.backend import compat, hooks

    hooks.install()
    polled = []

    async def poll(client, model_name):
        try:
            polled.append(model_name)
            await asyncio.sleep(60)
        finally:
            polled.append("cancelled")

    async def outputs():
        await asyncio.sleep(0.05)
        raise RuntimeError("vLLM's own task ends here")

    async def run():
        client = SimpleNamespace(client_index=int(who == "second server"), get_output_async=outputs)
        llm = SimpleNamespace(
            output_handler=None, engine_core=client, log_stats=False,
            renderer=SimpleNamespace(mm_processor_cache=None),
            logger_manager=None if who == "no stats" else object(),
            output_processor=SimpleNamespace(propagate_error=lambda error: None),
            vllm_config=SimpleNamespace(model_config=SimpleNamespace(served_model_name="tiny")),
        )  # fmt: skip
        AsyncLLM._run_output_handler(llm)
        AsyncLLM._run_output_handler(llm)  # as vLLM does with every request
        await asyncio.sleep(0.1)

    monkeypatch.setattr(exposition, "poll", poll)
    monkeypatch.setattr(compat, "asks_for_sparse", lambda config: who != "never asked")
    asyncio.run(run())
    assert polled == (["tiny", "cancelled"] if who == "shows" else [])
