"""`vllm-sparse eval`: samples, what a rerun keeps, the page, and the command on a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import make, select_reference
from eval_cases import Letters, row, running_text, some_rows, text_row
from test_models import model_of

from vllm_sparse.errors import ConfigError
from vllm_sparse.kernels import reference
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.policies.registry import DECODE_POLICIES
from vllm_sparse.tools import cli, commands
from vllm_sparse.tools.eval.recall import RecallProbe
from vllm_sparse.tools.eval.rows import Rows, cache_of, commit
from vllm_sparse.tools.eval.samples import Samples, spread
from vllm_sparse.tools.eval.settings import Setting, by_engine, grid
from vllm_sparse.tools.eval.summary import Summary, table
from vllm_sparse.tools.eval.tasks import TEXT

DOCUMENT = Path(__file__).parent.parent / "README.md"


def test_halves_are_apart():
    """Samples of both halves share no text and have the length asked for."""
    text = running_text()
    found = {
        split: [
            Samples(Letters(), text, split, 3, 20).make(task, 5000, seed)
            for task in (TEXT, "niah_single_2", "niah_multikey_1")
            for seed in range(3)
        ]
        for split in ("dev", "report")
    }
    for dev, report in zip(*found.values(), strict=True):
        assert dev.tokens != report.tokens
        for sample in (dev, report):
            total = len(sample.tokens) + sample.max_tokens
            assert total == 5000 if sample.task == TEXT else 0.95 * 5000 < total <= 5000
    for split, samples in found.items():
        passage = "".join(map(chr, samples[1].tokens + samples[1].forced))
        assert len(samples[1].forced) == samples[1].max_tokens == 21
        assert passage in (text[: len(text) // 2 + 40] if split == "dev" else text[len(text) // 2 - 40 :])
        assert len({str(sample.tokens) for sample in samples}) == len(samples)
        assert [sample.depth for sample in samples[3:]] == [0, 1, 0.5, None, None, None]


def test_places_are_evenly_spread():
    """Places are evenly spread however many there are."""
    assert [spread(seed) for seed in range(9)] == [0, 1, 0.5, 0.25, 0.75, 0.125, 0.375, 0.625, 0.875]
    for count in (2, 3, 5, 8, 33, 100):
        places = sorted(map(spread, range(count)))
        gaps = [after - before for before, after in pairwise(places)]
        assert places[0] == 0 and places[-1] == 1 and 0 < max(gaps) <= 2 * min(gaps)


@pytest.mark.parametrize("end", ["", "\n"])
def test_one_line_has_two_halves(end):
    """A text of one line has two halves."""
    text = "One sentence. " * 500 + end
    halves = [commands.half_of(text, split) for split in ("dev", "report")]
    assert "".join(halves) == text and min(map(len, halves)) >= len(text) // 2


def test_forced_tokens_follow_their_request():
    """Forced tokens follow their request through the batch."""
    pytest.importorskip("vllm")
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from vllm_sparse.tools.eval.force import FORCED, ForcedTokens

    processor = ForcedTokens(None, torch.device("cpu"), False)
    said = {name: [] for name in "abc"}

    def params(*tokens):
        return SimpleNamespace(extra_args={FORCED: list(tokens)} if tokens else None)

    def step(rows: int, removed=(), added=(), moved=()):
        processor.update_state(BatchUpdate(rows, list(removed), list(added), list(moved)))
        return processor.apply(torch.zeros(rows, 9)).argmax(1).tolist()

    added = [(0, params(3, 4), None, said["a"]), (1, params(), None, said["b"]), (2, params(5), None, said["c"])]
    assert step(3, added=added) == [3, 0, 5]
    processor.update_state(None)
    said["a"].append(3), said["c"].append(5)
    assert step(3) == [4, 0, 0], "what is forced ends, and the model goes on"
    assert step(3, moved=[(0, 1, MoveDirectionality.SWAP)]) == [0, 4, 0]
    assert step(3, removed=[0], moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)]) == [4, 0, 0]
    assert step(3, added=[(0, params(), None, [])]) == [0, 0, 0], "a row's next request is not forced"


def steps(logits: torch.Tensor, top: int) -> list[dict[int, float]]:
    found = logits.log_softmax(-1).topk(top)
    return [
        dict(zip(*(x.tolist() for x in pair), strict=True))
        for pair in zip(found.indices, found.values, strict=True)
    ]


def test_divergence_is_a_lower_bound():
    """The divergence is exact over all tokens and a lower bound over the likeliest."""
    from vllm_sparse.tools.eval.engine import agreement, divergence, loss

    dense = torch.randn(7, 40).double() * 3
    sparse = dense + torch.randn(7, 40)  # near enough that their likeliest tokens overlap
    exact = torch.nn.functional.kl_div(
        sparse.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()
    assert divergence(steps(dense, 40), steps(sparse, 40)) == pytest.approx(exact, rel=1e-4)
    bounds = [divergence(steps(dense, top), steps(sparse, top)) for top in (4, 20)]
    assert 0 < bounds[0] < exact and 0 < bounds[1] < exact
    assert divergence(steps(dense, 9), steps(dense, 9)) == 0
    assert agreement(steps(dense, 9), steps(dense, 9)) == 1
    same = (dense.argmax(-1) == sparse.argmax(-1)).double().mean().item()
    assert agreement(steps(dense, 9), steps(sparse, 9)) == pytest.approx(same)
    tokens = torch.randint(40, (7,))
    expected = torch.nn.functional.cross_entropy(dense, tokens).item()
    assert loss(steps(dense, 40), tokens.tolist()) == pytest.approx(expected)


def test_grid_of_settings():
    """The grid has dense, each choice alone, and all pairs."""
    settings = grid(["quest", "dense"], [256, 512], ["vertical_slash", "a_shape"], [0.9, 0.95], {})
    assert settings[0] == Setting() and settings[0].is_dense and len(settings) == len(set(settings)) == 3 * 4
    assert Setting("quest", 256) in settings and Setting("dense", None, "vertical_slash", 0.9) in settings
    assert Setting("quest", 512, "a_shape") in settings, "sizes of a fixed pattern are no share"
    everything = grid(list(DECODE_POLICIES), [256], ["dense"], [0.9], {})
    groups = by_engine(everything, {})
    assert {setting for group in groups for setting in group.settings} == set(everything)
    assert all(group.settings[0].is_dense for group in groups)
    kinds = [DECODE_POLICIES[group.start.policy].summary for group in groups]
    assert "none" not in kinds and len(set(kinds)) == len(kinds)
    for kind, group in zip(kinds, groups, strict=True):
        assert {DECODE_POLICIES[s.policy].summary for s in group.settings} <= {kind, "none"}
    assert len(grid(["quest", "quest"], [256, 256], ["dense"], [], {})) == 2
    (alone,) = by_engine(grid(["oracle"], [256, 512], ["dense"], [], {}), {})
    assert alone.start == Setting("oracle", 512)
    offloaded = grid(["quest"], [256], ["dense", "a_shape"], [], {"offload": {"host_gib": 1}})
    assert offloaded == [Setting("quest", 256), Setting("quest", 256, "a_shape")]


@pytest.mark.parametrize("policy", ["random", "oracle"])
def test_recall_weighs_exact_mass(policy):
    """Recall is the exact mass of the chosen pages over that of the best."""
    case = make([500, 40, 900], seed=3)
    impl = SimpleNamespace(
        num_kv_heads=2, device=case.q.device, attention=SimpleNamespace(attend=lambda *args: None),
        selection=case.selection(1, 20), config=SimpleNamespace(window_tokens=20),
    )  # fmt: skip
    probe = RecallProbe(impl, {})
    watched = probe.watch(DECODE_POLICIES[policy], 2)
    step = (case.q, case.kv, case.block_table, case.plan, case.geometry, case.scores)
    for _ in range(3):  # of which two are weighed
        watched.score(*step)
        select_reference(case)
        probe.attention.attend(case.q, case.kv, case.table, case.geometry, None)
    found = probe.take()
    assert found["rows"] == 4, "short rows choose nothing"
    chosen, best = torch.zeros(2), torch.zeros(2)
    exact = make([500, 40, 900], seed=3)
    reference.page_mass(exact.q, exact.kv, exact.block_table, exact.plan, exact.geometry, exact.scores)
    select_reference(exact)
    for request, length in ((0, 500), (2, 900)):
        blocks = case.block_table[request, : -(-length // 16)].tolist()
        for head in range(2):
            keys = case.kv[blocks, head, :16, :64].flatten(0, 1)[:length]
            weights = (case.q[request, 3 * head : 3 * head + 3] @ keys.T * case.scale).softmax(-1).mean(0)
            for total, pages in ((chosen, case.table), (best, exact.table)):
                head_pages = pages.head_pages[2 * request + head, : case.budget_pages]
                places = [blocks.index(block) for block in HeadPageGrid.of(case.kv).split(head_pages)[0].tolist()]
                total[head] += sum(weights[16 * place : 16 * place + 16].sum() for place in places)
    assert torch.allclose(torch.tensor(found["chosen"]).float(), 2 * chosen, rtol=1e-4)
    assert torch.allclose(torch.tensor(found["best"]).float(), 2 * best, rtol=1e-4)
    close = torch.allclose(torch.tensor(found["chosen"]), torch.tensor(found["best"]), rtol=1e-6)
    assert close == (policy == "oracle")


def test_fit_finds_exponents():
    """A fit finds the exponents that rows were made with."""
    fit = Summary(some_rows()).fit("quest")
    assert (fit.intercept, fit.length, fit.budget) == pytest.approx((math.log(3), 0.5, -1.0))
    assert fit.residual < 1e-6 and len(fit.points) == 6
    assert Summary(some_rows()).fit("dense") is None and Summary(some_rows()[:4]).fit("quest") is None
    covered = [text_row("quest", 16384, length, 1e-5) | {"attended": 1.0} for length in (4096, 8192)]
    assert Summary(some_rows() + covered).fit("quest").residual < 1e-6, (
        "a budget of the whole context costs nothing"
    )
    noisy = [r | {"kl": r["kl"] * (2 if r["budget"] == 512 else 1)} for r in some_rows() if "kl" in r]
    assert 0.2 < Summary(noisy).fit("quest").residual < 0.7


def test_page_is_complete_and_self_contained(tmp_path):
    """The page holds the table and every plot and nothing from elsewhere."""
    pytest.importorskip("matplotlib")
    from vllm_sparse.tools.eval import report

    summary = Summary(some_rows())
    assert summary.mean(Setting("quest", 256), TEXT, "excess", 4096) == pytest.approx(3 * 64 / 256)
    assert summary.mean(Setting("quest", 256), "niah_single", "score") == 0.5
    assert "quest 256" in table(summary) and "+0.9053" in table(summary)
    report.write(tmp_path / "page.html", summary)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == len(report.PLOTS) == 5
    assert "m&lt;1&gt;" in page and "<1>" not in page
    assert "<td>quest 256</td><td>+0.9053</td>" in page
    assert "http" not in page and "src='data:" in page
    report.write(tmp_path / "page.html", Summary([row("dense", None, "vt", score=0.5)]))
    assert (tmp_path / "page.html").read_text().count("<img") == 0, "nothing to compare"


def test_rows_name_the_commit(tmp_path):
    """Rows name the commit of a checkout and none of a plain install."""

    def git(*words: str) -> str:
        who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        command = ["git", *who, "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "vllm_sparse" / "module.py"
    source.parent.mkdir()
    source.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "--short", "HEAD")
    (tmp_path / "results").write_text("not of the package")
    assert commit(tmp_path) == head
    source.write_text("2")
    assert commit(tmp_path) == f"{head}+"
    assert commit(source.parent) is None  # a place inside a checkout of something else
    assert commit(tmp_path / "missing") is None


def test_cut_line_is_measured_again(tmp_path, capsys):
    """A line cut off is measured again and other files are refused."""
    path = tmp_path / "rows.jsonl"
    first, second = row(budget=256), row(budget=512)
    Rows(path).add([first])
    with path.open("a") as file:
        file.write(json.dumps(second)[:40])
    again = Rows(path)
    assert again.has(first) and not again.has(second) and "cut off" in capsys.readouterr().out
    again.add([second])
    assert Rows(path).rows == [first, second]
    for key in ("budget", "split", "seed", "length", "task", "model", "policy", "dtype", "kv_dtype"):
        assert not again.has(first | {key: "another"}), key
    older = {name: value for name, value in first.items() if name != "kv_dtype"}
    path.write_text(json.dumps(older) + "\n")
    assert Rows(path).has(first) and not Rows(path).has(first | {"kv_dtype": "fp8"}), "of before a choice"
    skipping = first | {"kv_skip_layers": ["1", "sliding_window"]}
    assert not Rows(path).has(skipping)
    assert cache_of(skipping) == "KV in float32, without layers 1, sliding_window"
    for other in ("{}\n", '{"decode_policy": "quest"}', "a note"):
        path.write_text(other)
        with pytest.raises(ConfigError, match=r"line 1 of .* is no result"):
            Rows(path)
        assert path.read_text() == other, "a file of somebody else is gone"


def test_foreign_results_are_not_continued(monkeypatch, tmp_path):
    """Another version may make a sample of the same number differently."""
    from vllm_sparse.tools.eval import run as module

    engine = SimpleNamespace(tokenizer=Letters(), run=lambda *args: pytest.fail("other samples were measured"))
    monkeypatch.setattr(module.EvalEngine, "start", lambda *args: nullcontext(engine))
    args = SimpleNamespace(
        model="m", dtype="float32", kv_dtype="float32", kv_cache_dtype_skip_layers=None,
        tensor_parallel_size=1, block_size=16, chunk=256,
        score_tokens=8, sparse={}, questions={},
        split="dev", tasks=["niah_single_2"], lengths=[3000], needles=2, passages=1, batch=2, recall_every=0,
        out=tmp_path / "rows.jsonl",
    )  # fmt: skip
    settings = grid(["quest"], [256, 512], ["dense"], [], {})
    run = module.Run(args, settings, running_text(), Rows(args.out))
    key = run._key("niah_single_2", 3000, 1, settings[0])
    run.rows.add([{"vllm": "1", **key, "depth": 0.25, "prompt_tokens": 2900, "score": 1.0}])
    with pytest.raises(ConfigError, match=r"--out: .*rows.jsonl holds .* niah_single_2 .* 3000 .* a new file"):
        run._group(by_engine(settings, {})[0], None, None)
    # Rows of other caches are kept apart, this run's last; those of another model are left out.
    mine = run.rows.rows[-1]
    fp8 = mine | {"kv_dtype": "fp8", "kv_skip_layers": ["sliding_window"]}
    run.rows.add([fp8, mine | {"model": "another"}])
    named = "KV in fp8, without layers sliding_window"
    assert list(run.by_cache().items()) == [(named, [fp8]), ("KV in float32", [mine])]
    run.common |= {"kv_dtype": "float16"}
    assert list(run.by_cache())[-1] == "KV in float16" and len(run.by_cache()) == 3


@pytest.mark.seam
@pytest.mark.parametrize(
    "asked, checkpoint, dtype",
    [
        ("auto", None, "bfloat16"),
        ("fp8_e4m3", None, "fp8"),
        ("auto", {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}, "fp8"),
        ("auto", {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, "fp8"),
        ("auto", {"quant_method": "compressed-tensors", "kv_cache_scheme": None}, "bfloat16"),
        ("bfloat16", {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}, "bfloat16"),
    ],
)
def test_rows_name_the_dtype_of_the_cache(asked, checkpoint, dtype):
    pytest.importorskip("vllm")
    config = SimpleNamespace(quantization_config=checkpoint)
    assert commands.kv_dtype(asked, SimpleNamespace(hf_config=config, dtype=torch.bfloat16)) == dtype


# Options, and what the refusal must say.
WRONG = {
    "task": (["--tasks", "text,needle"], ["--tasks: 'needle'", "niah_single"]),
    "policy": (["--policies", "quest,quset"], ["'quset'", "Did you mean 'quest'?", "midbound"]),
    "prefill": (["--prefill-policies", "slash"], ["'slash'", "vertical_slash"]),
    "budget": (["--budgets", "16"], ["budget_tokens: 16", "at least"]),
    "page": (["--budgets", "256", "--block-size", "256"], ["budget_tokens: 256", "pages of 256 tokens"]),
    "top_p": (["--prefill-policies", "xattention", "--top-p", "2"], ["--top-p: 2", "0 or more, up to 1"]),
    "dense": (["--policies", "dense"], ["only dense", "quest", "vertical_slash"]),
    "length": (["--lengths", "5000"], ["--lengths: 5000", "258 to 4096"]),
    "score": (["--score-tokens", "0"], ["--score-tokens: 0", "1 or more"]),
    "sparse": (["--sparse", '{"sink": 1}'], ["unknown key 'sink'", "sink_tokens"]),
    "compared": (["--sparse", '{"budget_tokens": 512}'], ["--sparse: budget_tokens is what is compared"]),
    "offload": (["--sparse", '{"offload": {}}'], ["--tasks: text", "offload refuses", "niah_single_2"]),
    "dense prefill": (["--tasks", "prefill_text"], ["--tasks: prefill_text", "--prefill-policies"]),
    "file": (["--tasks", "qa_1"], ["--tasks: qa_1", "--squad FILE"]),
    "no file": (["--tasks", "qa_2", "--hotpotqa", "/nowhere"], ["--hotpotqa: '/nowhere'", "HotpotQA"]),
    "compared policy": (["--compare", "dense", "quset:512"], ["'quset'", "Did you mean 'quest'?"]),
    "compared budget": (["--compare", "dense", "quest:0"], ["--compare: 0", "1 or more"]),
    "compared twice": (["--compare", "quest:512", "quest:512"], ["--compare: quest 512 twice", "that differ"]),
    "compared and listed": (["--compare", "dense", "quest:512", "--budgets", "256"], ["--budgets", "--compare"]),
    "compared offload": (["--compare", "dense", '{"offload": {}}'], ["--tasks: text", "offload refuses"]),
    "compared key": (["--compare", "dense", '{"sink": 1}'], ["--compare: unknown key 'sink'", "sink_tokens"]),
    "no memory": (["--gpu-memory-utilization", "0"], ["--gpu-memory-utilization: 0", "up to 1"]),
    "page of results": (["--out", "eval.html"], ["--out: eval.html", "the page", ".jsonl"]),
    "folder": (["--out", str(DOCUMENT.parent)], ["--out: ", "the path of a file"]),
    "text": (["--policies", "quest", "--text", "/nowhere"], ["--text: '/nowhere'", "a UTF-8 file"]),
}


@pytest.mark.engine
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_early(tiny, case, monkeypatch, capsys, tmp_path):
    """Wrong arguments are refused before an engine is built."""
    from vllm_sparse.tools.eval import command

    monkeypatch.setattr(command.Run, "all", lambda self: pytest.fail("an engine was built"))
    options, said = WRONG[case]
    fixed = ["--text", str(DOCUMENT), "--out", str(tmp_path / "x.jsonl"), "--block-size", "16"]
    assert cli.main(["eval", str(tiny.model()), *fixed, *options]) == 1
    message = capsys.readouterr().err
    for part in said:
        assert part in message


@pytest.mark.engine
def test_eval_equals_the_model(tiny, monkeypatch, capfd, tmp_path):
    """Eval equals the model, continues, and mixes no settings."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from transformers import AutoModelForCausalLM

    from vllm_sparse.tools.eval.run import Run

    text = tmp_path / "text.txt"
    text.write_text(running_text(400))
    out = tmp_path / "eval.jsonl"
    model = tiny.model(seed=1)
    sizes = {"dense_layers": 0, "min_prefill_tokens": 256, "vertical_tokens": 64, "slash_tokens": 64}
    options = [
        "eval", str(model), "--text", str(text), "--dtype", "float32", "--block-size", "16", "--chunk", "256",
        "--sparse", json.dumps(sizes), "--budgets", "128,1024", "--policies",
        "quest,oracle", "--prefill-policies", "a_shape", "--lengths", "700", "--passages", "2",
        "--score-tokens", "24", "--needles", "1", "--tasks", "text,niah_single",
        "--recall-every", "5", "--batch", "2",
    ]  # fmt: skip
    # The first run ends early: without the last settings of the texts, and without the other task.
    add, calls = Rows.add, []

    def interrupted(rows, new):
        calls.append(new)
        if len(calls) == 5:
            raise KeyboardInterrupt
        add(rows, new)

    monkeypatch.setattr(Rows, "add", interrupted)
    assert cli.main([*options, "--out", str(out)]) == 130
    monkeypatch.setattr(Rows, "add", add)
    first = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(first) == 8, "two passages under four settings"
    for path in (out, tmp_path / "whole.jsonl"):
        assert cli.main([*options, "--out", str(path)]) == 0
    found, whole = (
        [json.loads(line) | {"date": ""} for line in path.read_text().splitlines()] for path in (out, path)
    )
    assert [r | {"date": ""} for r in first] == found[:8]
    assert found == whole, "an interrupted run measures something else"
    assert len(found) == 3 * 2 * 5
    said = capfd.readouterr().out
    assert "holds 8 of 30 results: continuing there" in said and "quest 128, prefill a_shape" in said
    assert (tmp_path / "eval.html").read_text().count("<img") == 4

    monkeypatch.setattr(Run, "_group", lambda *args: pytest.fail("everything was measured before"))
    assert cli.main([*options, "--out", str(out)]) == 0

    def of(task: str = TEXT, seed: int = 0, **which) -> dict:
        which = {"policy": "dense", "budget": None, "prefill_policy": "dense", "task": task, "seed": seed} | which
        rows = [r for r in found if all(r[key] == value for key, value in which.items())]
        assert len(rows) == 1
        return rows[0]

    # The passages, as the model without any engine scores them.
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    from transformers import AutoTokenizer

    samples = Samples(AutoTokenizer.from_pretrained(model), text.read_text(), "report", 2, 24)
    for seed in range(2):
        sample = samples.make(TEXT, 700, seed)
        tokens = torch.tensor(sample.tokens + sample.forced)
        with torch.no_grad():
            logits = network(tokens[None]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[-25:-1], tokens[-24:]).item()
        dense = of(seed=seed)
        assert dense["loss"] == dense["dense_loss"] == pytest.approx(expected, abs=1e-3)
        assert dense["kl"] == 0 and dense["attended"] == 1 and dense["recall"] is None
        for policy in ("quest", "oracle"):
            full, part = of(seed=seed, policy=policy, budget=1024), of(seed=seed, policy=policy, budget=128)
            assert (
                full["loss"] == pytest.approx(expected, abs=1e-3) and full["kl"] < 1e-3 and full["attended"] == 1
            )
            assert part["kl"] > 0.01 and 0.15 < part["attended"] < 0.25
            assert part["layers"] == [0, 1, 2] and len(part["recall"]) == 3 and len(part["recall"][0]) == 2
            flat = [value for layer in part["recall"] for value in layer]
            assert flat == [1.0] * 6 if policy == "oracle" else max(flat) < 1
        assert of(seed=seed, policy="oracle", budget=128)["mass"][0][0] < 1
    sparse_prefill = of(prefill_policy="a_shape")
    assert 0.1 < sparse_prefill["prefill_density"] < 0.9
    assert sparse_prefill["attended"] == 1 and sparse_prefill["kl"] > 0.001
    task = of(task="niah_single_2", policy="quest", budget=128)
    assert task["score"] in (0, 1) and task["expected"][0].isdigit() and task["depth"] == 0


@pytest.mark.engine
@pytest.mark.parametrize("case", ["hybrid_of_several_groups", "sliding_window"])
def test_eval_with_few_sparse_layers(tiny, case, monkeypatch, capfd, tmp_path):
    """Eval of models with few sparse layers or none."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    text, out = tmp_path / "text.txt", tmp_path / "eval.jsonl"
    text.write_text(running_text(400))
    options = [
        "eval", str(model_of(tiny, case)), "--text", str(text), "--dtype", "float32",
        "--sparse", '{"dense_layers": 0}',
        "--budgets", "128,1024", "--policies", "oracle", "--lengths", "700", "--passages", "1", "--out", str(out),
        "--score-tokens", "8", "--tasks", "text", "--recall-every", "3",
    ]  # fmt: skip
    code = cli.main(options)
    if case == "sliding_window":
        assert code == 1 and "no layer of this model can be sparse (" in capfd.readouterr().err
        return
    assert code == 0
    dense, part, full = (json.loads(line) for line in out.read_text().splitlines())
    assert part["layers"] == [1, 2, 3, 4] and part["recall"] == [[1.0, 1.0]] * 4
    assert 0.1 < part["attended"] < 0.25 and full["attended"] == 1
    assert part["kl"] > full["kl"] < 1e-5 and full["loss"] == pytest.approx(dense["loss"], abs=1e-3)


@pytest.mark.seam
@pytest.mark.engine
def test_eval_of_a_quantised_cache(tiny, monkeypatch, tmp_path):
    """Rows of a cache in fp8 are compared with dense steps over the same cache, and are none of another dtype."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")  # which the command sets, here for all later tests
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    text, out = tmp_path / "text.txt", tmp_path / "eval.jsonl"
    text.write_text(running_text(400))
    options = [
        "eval", str(tiny.model(seed=1)), "--text", str(text), "--dtype", "float32", "--block-size", "16",
        "--sparse", '{"dense_layers": 0}', "--budgets", "128,1024", "--policies", "oracle", "--lengths", "700",
        "--passages", "1", "--out", str(out), "--score-tokens", "8", "--tasks", "text", "--recall-every", "3",
    ]  # fmt: skip
    for dtype in ("fp8", "auto"):
        assert cli.main([*options, "--kv-cache-dtype", dtype]) == 0
        assert ("KV fp8" in out.with_suffix(".html").read_text()) == (dtype == "fp8")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kv_dtype"] for row in rows] == ["fp8"] * 3 + ["float32"] * 3
    for dense, part, full in (rows[:3], rows[3:]):
        assert full["kl"] < 1e-5 < 0.01 < part["kl"] and full["dense_loss"] == dense["loss"]
        assert part["recall"] == [[1.0, 1.0]] * 3 and 0.1 < part["attended"] < 0.25
    assert 1e-4 < abs(rows[0]["loss"] - rows[3]["loss"]) < 0.5, "what fp8 alone costs"


@pytest.mark.engine
def test_offload_answers_as_resident(tiny, monkeypatch, tmp_path):
    """Answers with offload are those of resident pages."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    text, out = tmp_path / "text.txt", tmp_path / "eval.jsonl"
    text.write_text(running_text(400))
    for sparse in ({"dense_layers": 0}, {"offload": {"host_gib": 0.25}}):
        options = [
            "eval", str(tiny.model(seed=1)), "--text", str(text), "--dtype", "float32", "--block-size", "16",
            "--chunk", "256", "--sparse", json.dumps(sparse), "--budgets", "128,256", "--policies", "midbound",
            "--lengths", "700", "--needles", "2", "--tasks", "niah_single", "--out", str(out),
        ]  # fmt: skip
        assert cli.main(options) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    resident, offloaded = (
        [row for row in rows if ("offload" in row["sparse"]) == offload and row["policy"] == "midbound"]
        for offload in (False, True)
    )
    assert len(resident) == len(offloaded) == 4 and len(rows) == 10
    for name in ("budget", "seed", "attended", "answer", "score"):
        assert [row[name] for row in resident] == [row[name] for row in offloaded], name
