"""Speculative decoding: steps that verify drafts choose pages, whatever the drafts are worth."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("vllm")

from test_cache_summary import EngineWrites
from tiny_engine import attention_layers, outputs, prompts, tokens

from vllm_sparse.backend.builder import SparseMetadataBuilder

pytestmark = pytest.mark.engine

PROMPTS, NUM_TOKENS = prompts((3, 40, 300, 700, 333)), 24
EVERYTHING = {"budget_tokens": 1024}
FEW = {"budget_tokens": 128}


def ngrams(drafts: int) -> dict:
    return {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


class Proposer:
    """Proposes what is known to come, some of it spoilt, and of some requests nothing.

    In place of the module of vLLM's own n-grams, which brings Numba, after which no engine starts in a process
    without Triton: vLLM looks through all that was imported, and finds an object that it cannot look into.
    """

    def __init__(self, monkeypatch, wrong: float = 0.3, seed: int = 0):
        self.answers: list[list[int]] = []
        self.wrong, self.random = wrong, random.Random(seed)
        self.of_every_length = True
        self.lengths = Counter()
        """Query tokens of rows that verified drafts, and how many such rows."""
        with suppress(ImportError):  # from 0.33 on, where Model Runner V2 has its own
            from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

            monkeypatch.setattr(
                NgramGPUSpeculator, "propose", lambda *args, **more: self._propose_as_v2(*args, **more)
            )
        module = ModuleType("vllm.v1.spec_decode.ngram_proposer")
        module.NgramProposer = type("NgramProposer", (), {
            "__init__": lambda stub, config: None, "load_model": lambda stub, *_, **__: None,
            "propose": lambda stub, *args, **more: self.propose(*args, **more),
        })  # fmt: skip
        monkeypatch.setitem(sys.modules, module.__name__, module)
        build = SparseMetadataBuilder.build

        def watched(builder, *args, **kwargs):
            metadata = build(builder, *args, **kwargs)
            starts = metadata.query_start_loc[: metadata.num_decodes + 1]
            self.lengths.update((starts[1:] - starts[:-1]).tolist())
            return metadata

        monkeypatch.setattr(SparseMetadataBuilder, "build", watched)

    def _propose_as_v2(self, speculator, batch, *_, dummy_run: bool = False, **__) -> torch.Tensor:
        """[num_reqs, most]: the runner wants as many of every request; what is not proposed is wrong."""
        self.of_every_length = False
        drafts, states = speculator.drafts[: batch.num_reqs], speculator.req_states
        if not dummy_run:
            rows = batch.idx_mapping
            lengths, token_ids = states.total_len.gpu[rows].numpy(), states.all_token_ids.gpu[rows].numpy()
            found = self.propose(drafts.shape[1], [[0]] * len(rows), lengths, token_ids)
            for row, proposed in enumerate(found):
                drafts[row] = torch.tensor([*proposed, *[1] * drafts.shape[1]][: drafts.shape[1]])
        return drafts

    def propose(self, most: int, sampled, num_tokens, token_ids, **_) -> list[list[int]]:
        found = []
        for row, new in enumerate(sampled):
            so_far = token_ids[row, : num_tokens[row]].tolist()
            whole = next((answer for answer in self.answers if answer[: len(so_far)] == so_far), so_far)
            drafts = whole[len(so_far) : len(so_far) + self.random.randint(0, most)] if len(new) else []
            found.append([
                token if self.random.random() > self.wrong else self.random.randrange(1, 500) for token in drafts
            ])  # fmt: skip
        return found


@pytest.fixture
def proposer(monkeypatch):
    return Proposer(monkeypatch)


@pytest.mark.parametrize(
    "sparse",
    [pytest.param({}, marks=pytest.mark.seam), {"decode_policy": "sketch2"}, {"decode_policy": "twilight"},
     {"decode_policy": "oracle"}, {"decode_policy": "streaming"}, {"offload": {"host_gib": 0.05}}],
    ids=["midbound", "sketch2", "twilight", "oracle", "streaming", "offload"],
)  # fmt: skip
def test_a_budget_of_the_context_answers_as_stock_does(tiny, proposer, sparse):
    """Rows of none to three drafts in one batch, prompts that arrive beside them, rejected drafts."""
    expected = tiny.stock(PROMPTS, NUM_TOKENS)
    proposer.answers = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    with tiny.start(sparse={**EVERYTHING, **sparse}, speculative_config=ngrams(3)) as llm:
        assert tokens(llm, PROMPTS, NUM_TOKENS) == expected
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert set(proposer.lengths) == {1, 2, 3, 4} or (not proposer.of_every_length and proposer.lengths[4])
    assert counts["dense_verification_steps"] == 0
    assert counts["attended_tokens"] == counts["context_tokens"] > 0


@pytest.mark.parametrize(
    "sparse",
    [{}, pytest.param({"decode_policy": "sketch"}, marks=pytest.mark.seam), {"decode_policy": "twilight"},
     {"recall_monitor_every_steps": 2}],
    ids=["midbound", "sketch", "twilight", "monitor"],
)  # fmt: skip
def test_pages_are_chosen_and_summaries_stay_right(tiny, proposer, sparse, monkeypatch):
    """What rejected drafts have left in a page is in its summary until it is written again, as are their keys."""
    writes = EngineWrites(monkeypatch)
    expected = tiny.stock(PROMPTS, NUM_TOKENS)
    proposer.answers = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    with tiny.start(sparse={**FEW, **sparse}, speculative_config=ngrams(3), block_size=16) as llm:
        found = tokens(llm, PROMPTS, NUM_TOKENS)
        (counts,) = llm.collective_rpc("sparse_metrics")
        assert writes.check(llm)[16] > 40
    assert [len(answer) for answer in found] == [NUM_TOKENS] * len(PROMPTS) and found[:2] == expected[:2]
    assert counts["dense_verification_steps"] == 0 and proposer.lengths[4]
    assert counts["attended_tokens"] < 0.5 * counts["context_tokens"]
    if "recall_monitor_every_steps" in sparse:
        assert all(0 < share <= 1 for layers in counts["recall_by_layer"] for share in layers)


RESIDENT, CODES = None, {"host_dtype": "fp8"}


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(({}, RESIDENT), marks=pytest.mark.seam),
        ({"hot_fraction": 0}, RESIDENT),
        ({**CODES, "hot_fraction": 0}, CODES),
    ],
    ids=["slots", "in_place", "fp8"],
)
def test_offload_answers_as_resident_pages_do(tiny, proposer, pair):
    """A draft step writes to several pages of a request, which it attends to where they are staged."""
    expected = tiny.stock(PROMPTS, NUM_TOKENS)
    proposer.answers = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    answers = []
    for offload in pair:
        sparse = FEW if offload is RESIDENT else {**FEW, "offload": {"host_gib": 0.05, **offload}}
        proposer.random.seed(1)
        with tiny.start(sparse=sparse, speculative_config=ngrams(7), block_size=16) as llm:
            answers.append(tokens(llm, PROMPTS, NUM_TOKENS))
    assert max(proposer.lengths) == 8
    assert answers[1] == answers[0]


def test_sixteen_drafts_that_are_all_right(tiny, proposer):
    expected = tiny.stock(PROMPTS, 60)
    proposer.answers = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    proposer.wrong = 0.0
    with tiny.start(sparse=EVERYTHING, speculative_config=ngrams(16)) as llm:
        assert tokens(llm, PROMPTS, 60) == expected
    assert max(proposer.lengths) == 17


@pytest.mark.seam
def test_a_prompt_is_never_taken_for_drafts(tiny, proposer):
    """Chunks and prefix hits that leave one to four tokens of a prompt: prefill, which attends to all of it."""
    answers = []
    for chunk in (256, 64, 83):
        prompt = prompts((64 * 5 + 3,), seed=9)
        with tiny.start(
            sparse=FEW, speculative_config=ngrams(3), max_num_batched_tokens=chunk, block_size=16
        ) as llm:
            cold, warm = outputs(llm, prompt, 1), outputs(llm, prompt, 1)
            (counts,) = llm.collective_rpc("sparse_metrics")
        assert warm[0].num_cached_tokens == 320
        answers += [list(result[0].outputs[0].token_ids) for result in (cold, warm)]
        assert counts["context_tokens"] == 0, "prompt tokens are no decode steps"
    assert answers == [tiny.stock(prompt, 1)[0]] * 6


def test_drafts_of_a_step_must_fit_the_window(tiny):
    with (
        pytest.raises(ValueError, match=r"sparse\.window_tokens: 4 tokens.*4 drafts.*allowed: 5 or more"),
        tiny.start(sparse={"window_tokens": 4}, speculative_config=ngrams(4)),
    ):
        pass


def test_dense_decode_verifies_drafts_densely(tiny, proposer):
    expected = tiny.stock(PROMPTS, NUM_TOKENS)
    proposer.answers = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    sparse = {"decode_policy": "dense", "prefill_policy": "a_shape", "min_prefill_tokens": 2048}
    with tiny.start(sparse=sparse, speculative_config=ngrams(3)) as llm:
        assert tokens(llm, PROMPTS, NUM_TOKENS) == expected
        assert all(layer.impl.decode is None for layer in attention_layers(llm).values())


def test_codes_of_a_quantised_cache(tiny, proposer):
    """Codes of rejected drafts are written over as K and V are."""
    settings = {"kv_cache_dtype": "fp8", "block_size": 16}
    with tiny.start(sparse=EVERYTHING, **settings) as llm:
        expected = tokens(llm, PROMPTS, NUM_TOKENS)
    proposer.answers = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    with tiny.start(sparse=EVERYTHING, speculative_config=ngrams(3), **settings) as llm:
        assert tokens(llm, PROMPTS, NUM_TOKENS) == expected


def eagle_head(tiny) -> str:
    """A random EAGLE head for the tiny model, in a directory as they are published."""
    from safetensors.torch import load_file, save_file

    path = tiny.root / "eagle"
    if not path.exists():
        layer = tiny.model(num_hidden_layers=1, seed=5)
        shutil.copytree(layer, path)
        weights = load_file(path / "model.safetensors")
        hidden = weights["model.norm.weight"].numel()
        kept = {name.removeprefix("model."): value for name, value in weights.items() if ".layers." in name}
        del kept["layers.0.input_layernorm.weight"]
        kept["fc.weight"] = torch.randn(hidden, 2 * hidden) * 0.1
        save_file(kept, path / "model.safetensors", {"format": "pt"})
    return str(path)


@pytest.mark.parametrize("asked", [False, True], ids=["stock_head", "sparse_head"])
def test_an_eagle_head(tiny, asked):
    drafts = {"method": "eagle", "model": eagle_head(tiny), "num_speculative_tokens": 3}
    if asked:
        drafts["attention_backend"] = "SPARSE"
    expected = tiny.stock(PROMPTS, NUM_TOKENS)
    with tiny.start(sparse=EVERYTHING, speculative_config=drafts) as llm:
        assert tokens(llm, PROMPTS, NUM_TOKENS) == expected
        (counts,) = llm.collective_rpc("sparse_metrics")
        assert counts["sparse_layers"] == (4 if asked else 3) and counts["dense_verification_steps"] == 0
    with tiny.start(sparse=FEW, speculative_config=drafts) as llm:
        assert [len(answer) for answer in tokens(llm, PROMPTS, NUM_TOKENS)] == [NUM_TOKENS] * len(PROMPTS)
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert counts["attended_tokens"] < 0.7 * counts["context_tokens"]


@pytest.mark.parametrize("asked", [False, True], ids=["stock_head", "sparse_head"])
def test_offload_is_refused_beside_layers_of_drafts(tiny, asked):
    """Their steps write pages that the store has not planned."""
    drafts = {"method": "eagle", "model": eagle_head(tiny), "num_speculative_tokens": 3}
    if asked:
        drafts["attention_backend"] = "SPARSE"
    with (
        pytest.raises(
            ValueError, match=r"--speculative-config: not supported with sparse\.offload.*ngram, suffix"
        ),
        tiny.start(sparse={**FEW, "offload": {"host_gib": 0.05}}, speculative_config=drafts),
    ):
        pass


GLM = {
    "first_k_dense_replace": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64,
    "n_shared_experts": 1, "use_qk_norm": False, "num_nextn_predict_layers": 1,
}  # fmt: skip


def model_with_mtp_head(tiny) -> Path:
    """A random GLM 4.5, whose last layer has become its head for multi-token prediction."""
    from safetensors.torch import load_file, save_file

    path, head = tiny.root / "mtp", "model.layers.3"
    if not path.exists():
        shutil.copytree(tiny.model("glm4_moe", **GLM, num_hidden_layers=4), path)
        weights = load_file(path / "model.safetensors")
        hidden = weights["model.norm.weight"].numel()
        norms = {f"{head}.{name}.weight": torch.ones(hidden) for name in ("enorm", "hnorm", "shared_head.norm")}
        weights |= norms | {
            f"{head}.eh_proj.weight": torch.randn(hidden, 2 * hidden) * 0.1,
            f"{head}.shared_head.head.weight": weights["lm_head.weight"].clone(),
            f"{head}.embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
        }
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": 3}
        (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_head_for_multi_token_prediction(tiny):
    model = model_with_mtp_head(tiny)
    expected = tiny.stock(PROMPTS, NUM_TOKENS, model=model)
    drafts = {"method": "mtp", "num_speculative_tokens": 2}
    with tiny.start(model, EVERYTHING, speculative_config=drafts) as llm:
        assert tokens(llm, PROMPTS, NUM_TOKENS) == expected
        (counts,) = llm.collective_rpc("sparse_metrics")
    assert (counts["sparse_layers"], counts["dense_verification_steps"]) == (3, 0)
    assert counts["attended_tokens"] == counts["context_tokens"] > 0
