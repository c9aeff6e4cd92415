"""Settings of `vllm-sparse eval` beside each other: intervals, paired differences, and the estimate of time."""

from __future__ import annotations

import math
import random

import pytest
from eval_cases import row, text_row

from vllm_sparse.errors import ConfigError
from vllm_sparse.tools.eval import intervals, pairs
from vllm_sparse.tools.eval.estimate import Speed, Work, duration
from vllm_sparse.tools.eval.samples import Sample, Turn
from vllm_sparse.tools.eval.settings import Setting, by_engine, pair, parse
from vllm_sparse.tools.eval.summary import Summary
from vllm_sparse.tools.eval.tasks import TEXT


def test_wilson():
    """Known values, and no point where all samples agree."""
    assert intervals.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert intervals.wilson(0.0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert intervals.wilson(1.0, 10) == pytest.approx((0.7225, 1), abs=1e-4)


def test_paired_interval():
    """Nothing gained or lost in few samples proves little; order of the two turns the interval round."""
    low, high = intervals.paired([0.0] * 10)
    assert (low, high) == pytest.approx((-0.2775, 0.2775), abs=1e-4)
    found = intervals.paired([-1.0, -1, -1, 0, 0, 0, 0, 0.5, 0, 0])
    assert found == pytest.approx([-x for x in intervals.paired([1.0, 1, 1, 0, 0, 0, 0, -0.5, 0, 0])][::-1])
    assert -0.6 < found[0] < -0.25 < found[1] < 0.15
    assert intervals.paired([-1.0] * 4)[0] == -1 and intervals.paired([-1.0] * 4)[1] < 0


@pytest.mark.parametrize("gain, loss", [(0.05, 0.3), (0.0, 0.1), (0.2, 0.2)])
@pytest.mark.parametrize("parts", [1, 4])
def test_intervals_cover(gain, loss, parts):
    """About 95 % of the intervals, or more, hold the true difference, also of scores between 0 and 1."""
    numbers, covered = random.Random(1), 0
    for _ in range(1000):
        # A score of several parts that are gained or lost together or not at all.
        found = []
        for _ in range(30):
            drawn = numbers.random()
            share = numbers.randint(1, parts) / parts
            found.append(share if drawn < gain else -share if drawn < gain + loss else 0.0)
        low, high = intervals.paired(found)
        covered += low <= (gain - loss) * (1 + 1 / parts) / 2 <= high
    assert covered / 1000 > 0.93


def test_bootstrap():
    """The percentile bootstrap is near the normal interval, and says nothing of few samples."""
    numbers = random.Random(2)
    values = [numbers.gauss(3, 2) for _ in range(400)]
    low, high = intervals.bootstrap(values)
    mean = sum(values) / len(values)
    half = 1.96 * math.sqrt(sum((x - mean) ** 2 for x in values) / len(values) / len(values))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.03)
    assert intervals.bootstrap(values) == (low, high) and intervals.bootstrap(values[:4]) is None


def scored(
    policy: str, budget: int | None, scores: list[float], task: str = "vt", length: int = 4096
) -> list[dict]:
    return [
        row(policy, budget, task, length, seed=seed, score=score, answer=f"{policy} {seed}", expected=["yes"])
        for seed, score in enumerate(scores)
    ]


def test_settings_are_paired_by_sample():
    """Differences are of samples that both have, and lost ones are named with their answers."""
    rows = [
        *scored("dense", None, [1, 1, 0.5, 0, 1]), *scored("quest", 256, [1, 0, 0.25, 1]),
        *scored("dense", None, [1], length=8192), *scored("quest", 256, [0], length=8192),
    ]  # fmt: skip
    for seed in range(6):
        rows += [text_row("dense", None, 4096, 0.0) | {"seed": seed}]
        rows += [text_row("quest", 256, 4096, 0.1 * (seed + 1)) | {"seed": seed}]
    summary, quest = Summary(rows), Setting("quest", 256)
    found = pairs.pair(summary, Setting(), quest, "vt", 4096)
    assert list(found.differences.values()) == [0, -1, -0.25, 1]
    assert found.lost == [("vt", 4096, 1), ("vt", 4096, 2)] and found.won == 1
    assert found.interval == intervals.paired([0, -1, -0.25, 1])
    text = pairs.pair(summary, Setting(), quest, TEXT)
    assert len(text.lost) == 6 and text.won == 0 and text.lost[0] == (TEXT, 4096, 5), "more loss is worse"
    lines = {line[:2]: line[2:] for line in pairs.lines(summary)}
    dense = "{:.3f} to {:.3f}".format(*intervals.wilson(0.75, 6))
    assert lines["vt", "dense"] == ("0.750", dense, "", "", "", "", "6")
    mean, interval, difference, _, lost, won, count = lines["vt", "quest 256"]
    assert (mean, difference, lost, won, count) == ("0.450", "-0.250", "3", "1", "5")
    assert interval == "{:.3f} to {:.3f}".format(*intervals.wilson(0.45, 5))
    mean, _, difference, between, lost, won, count = lines["text, loss in nats", "quest 256"]
    assert (mean, difference, lost, won, count) == ("2.350", "+0.350", "6", "0", "6") and between.startswith("+0.")
    said = pairs.comparison(summary, Setting(), quest)
    assert "quest 256 less dense" in said and "vt, 4,096 tokens, seed 1: 1.00 to 0.00" in said
    assert "expected 'yes'; dense said 'dense 1', quest 256 'quest 1'" in said
    assert "vt, 8,192 tokens, seed 0" in said and "seed 3" not in said, "won samples are not lost"
    assert "Lost samples" not in pairs.comparison(summary, Setting(), Setting())


def test_caches_are_paired_by_sample():
    """Rows over another KV cache are compared setting by setting, on the samples that both have."""
    before = [*scored("dense", None, [1, 1]), *scored("quest", 256, [1, 0, 1]), text_row("quest", 256, 4096, 0.1)]
    after = [*scored("dense", None, [1, 0]), *scored("quest", 256, [1, 1]), *scored("quest", 512, [1])]
    after.append(text_row("quest", 256, 4096, 0.3))
    heading, *lines = pairs.caches(Summary(before), Summary(after)).splitlines()
    assert heading.split()[:5] == ["task", "setting", "that", "this", "difference"]
    assert len(lines) == 3, "a setting that one lacks is left out"
    assert lines[0].split() == ["text", "quest", "256", "2.100", "2.300", "+0.200", "1", "0", "1"]
    interval = "{:+.3f} to {:+.3f}".format(*intervals.paired([0, -1])).split()
    assert lines[1].split() == ["vt", "dense", "1.000", "0.500", "-0.500", *interval, "1", "0", "2"]
    assert lines[2].split()[3:6] == ["0.500", "1.000", "+0.500"] and lines[2].split()[-3:] == ["0", "1", "2"]


def test_settings_to_compare():
    """Settings are written as policy and budget, or as JSON, whose further keys are theirs alone."""
    assert pair([parse("dense"), parse("sketch:512")], {}) == [Setting(), Setting("sketch", 512)]
    one, other = pair([parse('{"decode_policy": "quest", "window_tokens": 64}'), parse("quest:2048")], {})
    assert one == Setting("quest", 2048, more='{"window_tokens": 64}') and other == Setting("quest", 2048)
    assert one.mapping({})["window_tokens"] == 64 and "window_tokens" not in other.mapping({})
    assert one.describe() == "quest 2048, window_tokens=64"
    assert one.columns()["more"] == {"window_tokens": 64} and other.columns()["more"] is None
    assert Setting.of_row(one.columns()) == one
    quality = Setting.of(parse("quality:512"), {})
    assert (
        quality == Setting("sketch2", 512) == Setting.of(parse('{"preset": "quality", "budget_tokens": 512}'), {})
    )
    # Keys of its own are an engine of its own; dense attention runs in both.
    groups = by_engine([Setting(), one, other], {})
    assert [group.settings for group in groups] == [(Setting(), one), (Setting(), other)]
    assert [group.start for group in groups] == [one, other]
    offload = pair([parse('{"decode_policy": "quest", "offload": {"host_gib": 1}}'), parse("dense")], {})[0]
    groups = by_engine([Setting(), offload], {})
    assert [group.settings for group in groups] == [(Setting(),), (offload,)], "with offload nothing is dense"
    assert groups[0].start == Setting("quest", 2048) and groups[1].start == offload
    prefill = parse('{"decode_policy": "dense", "prefill_policy": "a_shape"}')
    assert pair([prefill, parse("dense")], {})[0] == Setting("dense", None, "a_shape")
    for wrong in ('{"preset": []}', '{"preset": "balanct"}'):
        with pytest.raises(ConfigError, match="preset"):
            Setting.of(parse(wrong), {})
    with pytest.raises(ConfigError, match="--sparse: budget_tokens is what is compared"):
        pair([parse("dense"), parse("quest:512")], {"budget_tokens": 512})


def test_estimate():
    """Prompts count once for all settings that prefill them alike, and once for each where turns follow."""
    settings = {Setting(), Setting("quest", 256), Setting("quest", 256, "a_shape")}
    work = Work()
    work.add(Sample("vt", 4096, 0, [0] * 1000, 50), 10, settings, 4)
    assert (work.prefill_tokens, work.answer_tokens, work.steps) == (10 * 1000 * 2, 10 * 50 * 3, 3 * 50 * 3)
    work = Work()
    work.add(Sample("many_turns", 4096, 0, [0] * 1000, 50, turns=(Turn([0], 30, ()),)), 1, settings, 4)
    assert (work.prefill_tokens, work.answer_tokens, work.steps) == (3000, 240, 240)
    speed = Speed(1000.0, 0.02, 4)
    assert speed.seconds(work) == pytest.approx(3 + 4.8)
    assert speed.describe(work) == "8 s, at 1,000 tokens/s of prefill, 20.0 ms a decode step of 4 requests"
    assert [duration(n) for n in (5, 600, 9000)] == ["5 s", "10 min", "2.5 h"]
