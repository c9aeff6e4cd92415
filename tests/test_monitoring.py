"""What operators read: ``vllm:sparse_*`` of a real engine and of a real server, by a real Prometheus."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from tiny_engine import engine_core, prompts, tokens
from tiny_server import serve

from benchmarks.prometheus import Prometheus, binary, scraping
from vllm_sparse import metrics

ROOT = Path(__file__).parent.parent
DASHBOARD, ALERTS, PAGE = ROOT / "examples/grafana.json", ROOT / "examples/alerts.yml", ROOT / "docs/monitoring.md"
STOCK = {"vllm:generation_tokens_total", "vllm:kv_cache_usage_perc"}
"""Metrics of vLLM's own that the dashboard shows beside ours."""
SPARSE = {
    "budget_tokens": 192, "dense_layers": 1, "min_context_tokens": 64, "recall_monitor_every_steps": 2,
    "prefill_policy": "a_shape", "min_prefill_tokens": 128, "vertical_tokens": 32, "slash_tokens": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def exposition():
    pytest.importorskip("vllm")
    from vllm_sparse.backend import exposition

    return exposition


def needs(name: str) -> str:
    """Path of a program of Prometheus; without one the test is skipped."""
    try:
        return binary(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def promtool(*arguments, text: str | None = None) -> None:
    """Run promtool, which must find nothing to complain about; ``text`` goes to its input."""
    command = [needs("promtool"), *map(str, arguments)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def wait_for(prometheus: Prometheus, expression: str, value: float) -> None:
    """Until a sum of counters has come to ``value``."""
    deadline, found = time.monotonic() + 60, None
    while found != value:
        assert time.monotonic() < deadline, f"{expression} is {found}, not {value}"
        time.sleep(0.2)
        series = prometheus.query(f"sum({expression})")
        found = float(series[0]["value"][1]) if series else None


def series_of(prometheus: Prometheus, expression: str) -> list[dict]:
    """What an expression gives; on a busy machine a scrape may time out, and then there is nothing for a while."""
    deadline = time.monotonic() + 60
    while not (found := prometheus.query(expression)):
        assert time.monotonic() < deadline, f"no data: {expression}"
        time.sleep(0.2)
    return found


# In an engine


def counts_of(llm) -> dict[tuple[str, ...], float]:
    """What the only worker counts, by name and values of labels."""
    (samples,) = llm.collective_rpc("sparse_recent")
    return {(name, *labels): value for name, labels, value in samples}


@pytest.mark.engine
@pytest.mark.seam
def test_counts_of_a_worker_are_those_of_its_snapshot(tiny):
    with tiny.start(sparse=SPARSE) as llm:
        tokens(llm, prompts((700, 20, 100)), 12)  # sparse, short, and covered by the budget
        counts, snapshot = counts_of(llm), metrics.snapshot()
        worker = engine_core(llm).model_executor.driver_worker.worker
        worker.sparse_asleep = {"kv_cache"}
        tokens(llm, prompts((20,)), 4)
        assert counts_of(llm) == counts, "asleep, the memory of counters is not touched"
        worker.sparse_asleep = set()
        assert counts_of(llm)["decode_rows",] > counts["decode_rows",]
    assert counts["attention_layers", "sparse", ""] == 2
    assert counts["attention_layers", "dense", "dense_layers=1"] == 1
    assert counts["decode_attended_tokens",] == snapshot["attended_tokens"] < counts["decode_context_tokens",]
    assert counts["decode_context_tokens",] == snapshot["context_tokens"]
    assert counts["prefill_attended_pairs",] == snapshot["prefill_attended_pairs"]
    assert (
        counts["prefill_context_pairs",] == snapshot["prefill_causal_pairs"] > snapshot["prefill_attended_pairs"]
    )
    # The first of 12 tokens comes from the prompt, and a prompt's last token alone is no decode row.
    assert counts["decode_rows",] == 33 and counts["steps", "decode", "sparse"] >= 11
    dense = {reason: counts["dense_decode_rows", reason] for reason in ("short", "budget", "scores", "draft")}
    assert dense == {"short": 11, "budget": 11, "scores": 0, "draft": 0}
    assert counts["steps", "prefill", "sparse"] >= 2 and counts["steps", "prefill", "dense"] >= 1
    for layer in ("1", "2"):
        samples = counts["recall_samples", layer]
        assert 0 < counts["recall_mass", layer] < samples and samples % 2 == 0, "two KV heads"


@pytest.mark.engine
def test_an_engine_that_never_chooses_says_so(tiny):
    sparse = {**SPARSE, "decode_policy": "dense", "recall_monitor_every_steps": 0}
    with tiny.start(sparse=sparse) as llm:
        tokens(llm, prompts((300,)), 5)
        counts = counts_of(llm)
    assert counts["dense_decode_rows", "policy"] == counts["decode_rows",] == 4
    assert counts["steps", "decode", "dense"] == 4 and counts["steps", "decode", "sparse"] == 0


@pytest.mark.engine
def test_offload_counts_the_hot_set_and_what_the_host_gave(tiny, exposition):
    settings = {key: value for key, value in SPARSE.items() if "monitor" not in key}
    sparse = {**settings, "dense_layers": 0, "offload": {"host_gib": 0.1, "hot_fraction": 0.02}}
    with tiny.start(sparse=sparse) as llm:
        tokens(llm, prompts((700, 500)), 12)
        core = engine_core(llm)
        assert exposition.counts_of_workers(core) is None
        answer = exposition.counts_of_workers(core)
        snapshot = metrics.snapshot()
        pool = next(iter(metrics.decided)).impl.counts.hot.pool_bytes
    counts = exposition.merged(answer["workers"], 0.5)
    moved = snapshot["head_pages_fetched"] + snapshot["head_pages_in_place"]
    assert counts["hot_set_lookups",] == snapshot["head_pages_looked_up"] > 0
    assert counts["hot_set_hits",] == snapshot["head_pages_looked_up"] - moved > 0
    assert counts["host_read_bytes", "decode"] == moved * snapshot["head_page_bytes"]
    page = 2 * snapshot["head_page_bytes"]
    assert counts["host_read_bytes", "prefill"] > 0 and counts["host_read_bytes", "prefill"] % page == 0
    assert (counts["host_pool_bytes",], counts["host_pool_used_bytes",]) == (pool, pool / 2) and pool > 0


# What operators read


def expressions() -> list[str]:
    """Every query of the dashboard and of the alerts, as Prometheus gets them."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    variables = {"$__rate_interval": "1m", "$model": ".*", "$engine": ".*", "$instance": ".*"}
    for name, value in variables.items():
        found = [text.replace(name, value) for text in found]
    rules = (rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"])
    return found + [rule["expr"] for rule in rules]


def test_dashboard_and_alerts_name_metrics_that_exist_and_the_page_names_all(exposition):
    ours = {metric.exposed for metric in exposition.METRICS}
    named = {name for text in expressions() for name in re.findall(r"vllm:\w+", text)}
    assert named <= ours | STOCK, "no such metrics"
    assert ours <= named, "metrics that neither the dashboard nor an alert shows"
    rows = re.findall(r"^\| `(vllm:sparse_\w+)` \| (.*?) \|", PAGE.read_text(), re.M)
    assert {name for name, _ in rows} == ours and len(rows) == len(ours)
    for metric in exposition.METRICS:
        labels = dict(rows)[metric.exposed]
        assert re.findall(r"`(\w+)`", labels) == list(metric.labels), f"labels of {metric.exposed}"


def test_the_dashboard_is_one_by_grafanas_schema():
    """Grafana's own classes read it and write the same: a key that they do not know would be lost."""
    dashboard = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()
    text = json.loads(DASHBOARD.read_text())

    def unknown() -> list[str]:
        return lost(text, json.loads(JSONEncoder().encode(dashboard.Dashboard.from_json(text))))

    assert unknown() == []
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in text["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in text["panels"]})
    text["panels"][1]["targets"][0]["expression"] = text["panels"][0]["units"] = "short"
    assert unknown() == [".panels[0].units", ".panels[1].targets[0].expression"], "the check can fail"


def lost(given, kept, path: str = "") -> list[str]:
    """Where ``kept`` lacks something that ``given`` has, or has another value."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [place for key in given for place in lost(given[key], kept.get(key), f"{path}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [place for at in range(len(given)) for place in lost(given[at], kept[at], f"{path}[{at}]")]
    return [] if given == kept else [path]


def test_alerts_are_rules_that_fire_and_do_not_fire(tmp_path):
    promtool("check", "rules", ALERTS)
    promtool("test", "rules", ROOT / "tests" / "alerts_test.yml")


@pytest.mark.engine
@pytest.mark.processes
def test_prometheus_scrapes_two_ranks_through_two_api_servers(tiny, tmp_path):
    """A real Prometheus, a real server: what is counted, once however many ranks and servers count it."""
    needs("prometheus")
    lengths, answers = (700, 20, 100), 12
    with tiny.start(sparse=SPARSE) as llm:
        expected = tokens(llm, prompts(lengths), answers)
    arguments = ("--tensor-parallel-size=2", "--api-server-count=2", "--distributed-executor-backend=mp")
    with serve(tmp_path, tiny.model(), SPARSE, *arguments, VLLM_CPU_OMP_THREADS_BIND="nobind") as server:
        server.wait()
        with scraping(tmp_path / "prometheus", server.url) as prometheus:
            for prompt, answer in zip(prompts(lengths), expected, strict=True):
                choice = server.choice("/v1/completions", prompt=prompt, max_tokens=answers)
                assert choice["token_ids"] == answer, "each rank chooses for its own heads"
            rows = "vllm:sparse_decode_rows_total"
            wait_for(prometheus, rows, 3 * (answers - 1))
            time.sleep(4)  # rows of drafts aside, ranks answer one poll after each other
            with server.request("/metrics") as response:
                text = response.read().decode()
            for expression in expressions():
                if re.search("hot_set|host_|> |< ", expression):
                    prometheus.query(expression)
                else:
                    series_of(prometheus, expression)

            def value(expression):
                return float(series_of(prometheus, expression)[0]["value"][1])

            labels = series_of(prometheus, rows)[0]["metric"]
            assert (labels["model_name"], labels["engine"]) == ("tiny", "0")
            assert value('vllm:sparse_attention_layers{state="sparse"}') == 2, "counted once, not once a rank"
            assert value('vllm:sparse_dense_decode_rows_total{reason="short"}') == answers - 1
            assert value('vllm:sparse_dense_decode_rows_total{reason="budget"}') == answers - 1
            for layer in (1, 2):
                samples = value(f'vllm:sparse_recall_samples_total{{layer="{layer}"}}')
                assert samples > 0 and samples % 2 == 0, "each rank has one KV head"
            steps = "sum(vllm:sparse_steps_total{phase='decode'%s})"
            assert value(steps % "") == 3 * (answers - 1)
            assert value(steps % ",attention='sparse'") == answers - 1
            attended = value("vllm:sparse_decode_attended_tokens_total")
            assert 0 < attended < value("vllm:sparse_decode_context_tokens_total")
        log = server.log.read_text()
    ours = [line for line in text.splitlines(keepends=True) if "vllm:sparse_" in line]
    promtool("check", "metrics", text="".join(ours).replace("vllm:", "vllm_"))  # vLLM's colon is no good manners
    assert "stay as they are" not in log
