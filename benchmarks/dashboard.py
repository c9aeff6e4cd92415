"""Draw docs/grafana.png: what examples/grafana.json shows of servers under load, without Grafana.

    python -m benchmarks.dashboard --seconds 120

Serves the demo's model on this machine, resident and offloaded, sends both pieces of essays, has a real Prometheus
scrape them, and plots what it answers to the queries of the dashboard's panels.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import EngFormatter, PercentFormatter

from benchmarks.prometheus import Prometheus, scraping
from vllm_sparse.tools.demo.server import Server
from vllm_sparse.tools.demo.smollm2 import prepare
from vllm_sparse.tools.demo.texts import essays

ROOT = Path(__file__).parent.parent
COMMON = {
    "budget_tokens": 256, "min_context_tokens": 512, "prefill_policy": "vertical_slash",
    "min_prefill_tokens": 1024, "vertical_tokens": 256, "slash_tokens": 256, "prefill_top_p": 0,
}  # fmt: skip
SERVERS = {
    "resident": {**COMMON, "recall_monitor_every_steps": 16},
    "offloaded": {**COMMON, "offload": {"host_gib": 1, "hot_fraction": 0.2}},
}
OPTIONS = ["--max-model-len", "4096", "--block-size", "16", "--max-num-seqs", "2", "--attention-backend", "sparse"]
RATE, STEP = "20s", 2
"""Window of rates, and seconds between two points."""
FORMATS = {"percentunit": PercentFormatter(1), "bytes": EngFormatter("B"), "Bps": EngFormatter("B/s")}


def load(server: Server, text: str, until: float, seed: int) -> None:
    """Send pieces of ``text``, of 1,000 to 12,000 characters, one after the other."""
    choice = random.Random(seed)
    while time.time() < until:
        begin, size = choice.randrange(len(text) // 2), round(1000 * 12 ** choice.random())
        body = {"model": "demo", "prompt": text[begin : begin + size], "max_tokens": choice.randrange(20, 80)}
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/v1/completions",
            json.dumps({**body, "ignore_eos": True}).encode(), {"Content-Type": "application/json"},
        )  # fmt: skip
        urllib.request.urlopen(request, timeout=600).close()


def query(expression: str, port: int) -> str:
    """An expression of the dashboard with its variables filled in, about the server at ``port``."""
    for variable, value in {"$__rate_interval": RATE, "$engine": ".*", "$model": ".*", "$instance": ".*"}.items():
        expression = expression.replace(variable, value)
    return expression.replace("{model_name", f'{{instance="127.0.0.1:{port}",model_name')


def legend(text: str, labels: dict[str, str]) -> str:
    """What Grafana shows for a legend such as ``engine {{engine}}``."""
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), text).strip()


def draw(axes, panel: dict, prometheus: Prometheus, ports: dict[str, int], begin: float, end: float) -> None:
    """One panel, with the lines of both servers where both have some."""
    stacked = panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking") is not None
    for server, port in ports.items():
        names, lines = [], []
        for target in panel["targets"]:
            expression = query(target["expr"], port)
            for series in prometheus.get("query_range", query=expression, start=begin, end=end, step=STEP):
                names.append(f"{server}: {legend(target['legendFormat'], series['metric'])}")
                lines.append({float(at) - begin: float(value) for at, value in series["values"]})
        if panel["type"] == "bargauge":
            axes.barh(names, [list(line.values())[-1] for line in lines])
        elif stacked and server == "resident":  # stacks of two servers would hide each other
            times = sorted(set.union(*map(set, lines)))
            axes.stackplot(times, [[line.get(at, 0) for at in times] for line in lines], labels=names)
        elif not stacked:
            for name, line in zip(names, lines, strict=True):
                axes.plot(line.keys(), line.values(), label=name)
    defaults = panel["fieldConfig"]["defaults"]
    if panel["type"] == "timeseries":
        axes.set_xlim(0, end - begin)
        axes.set_ylim(defaults.get("min"), defaults.get("max"))
        axes.yaxis.set_major_formatter(FORMATS.get(defaults["unit"], EngFormatter()))
        axes.legend(fontsize=6, loc="best")
    axes.set_title(panel["title"], fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.2)


def paint(panels: list[dict], prometheus: Prometheus, ports: dict[str, int], begin: float, path: Path) -> None:
    """All panels from ``begin`` to now, two beside each other."""
    rows = (len(panels) + 1) // 2
    figure, grid = plt.subplots(rows, 2, figsize=(12, 2.4 * rows))
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw(axes, panel, prometheus, ports, begin, time.time())
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=120, help="how long requests are sent")
    seconds = parser.parse_args().seconds
    model, text, panels = prepare(), essays(), json.loads((ROOT / "examples/grafana.json").read_text())["panels"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {}
        for name, sparse in SERVERS.items():
            options = [*OPTIONS, "--additional-config", json.dumps({"sparse": sparse})]
            server = Server(model, options, folder / f"{name}.log", torch.cuda.is_available())
            servers[name] = stack.enter_context(server)
        ports = {name: server.port for name, server in servers.items()}
        urls = (f"http://127.0.0.1:{port}" for port in ports.values())
        prometheus = stack.enter_context(scraping(folder / "prometheus", *urls))
        begin = time.time()
        senders = [
            threading.Thread(target=load, args=(server, text, begin + seconds, seed))
            for server in servers.values() for seed in range(2)
        ]  # fmt: skip
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        time.sleep(5)
        paint(panels, prometheus, ports, begin, ROOT / "docs/grafana.png")


if __name__ == "__main__":
    main()
