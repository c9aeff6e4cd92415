"""The one timer of all kernel benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch


def graph_us(runs: list[Callable[[], object]], repeats: int = 30) -> float:
    """Median microseconds of one run, from replays of a CUDA graph that holds each of ``runs`` once.

    Several runs over different data keep the L2 cache from holding what a real step would read
    from memory; the graph leaves launch gaps out.
    """
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    for _ in range(3):
        graph.replay()
    for start, end in zip(starts, ends, strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True))
    return times[repeats // 2] * 1e3 / len(runs)
