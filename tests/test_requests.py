"""What single requests may ask for, and which rows of a step it reaches."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm_sparse.backend import compat
from vllm_sparse.backend.requests import RequestBudgets, RequestError, asked_tokens, check
from vllm_sparse.pages.decode_plan import EXACT


def engine(block_size=16, max_model_len=8192, hybrid=False, cache_dtype="bfloat16", **sparse):
    model = SimpleNamespace(is_encoder_decoder=False, is_hybrid=hybrid, max_model_len=max_model_len)
    cache = SimpleNamespace(block_size=block_size, cache_dtype=cache_dtype)
    return SimpleNamespace(additional_config={"sparse": sparse}, model_config=model, cache_config=cache)


GOOD = [
    (None, 0), ({}, 0), ({"session_id": "x", "k": 1}, 0), ({"sparse": True}, 0), ({"sparse": 1}, 0),
    ({"sparse": False}, EXACT), ({"sparse": 0}, EXACT), ({"sparse_budget": 512}, 512),
    ({"sparse": True, "sparse_budget": 96}, 96), ({"sparse_budget": 2048}, 2048),
]  # fmt: skip


@pytest.mark.parametrize("extra_args, tokens", GOOD)
def test_what_is_asked_for(extra_args, tokens):
    check(extra_args, engine())
    assert asked_tokens(extra_args) == tokens


# What is wrong, in which engine, and what the refusal must say of it.
WRONG = [
    ({"sparse_budget": 2049}, {}, ["sparse_budget: 2049", "from 80", "to 2048, the budget_tokens"]),
    ({"sparse_budget": 79}, {}, ["sparse_budget: 79", "from 80", "sink_tokens=16", "window_tokens=32"]),
    ({"sparse_budget": 127}, {"block_size": 32}, ["sparse_budget: 127", "from 128", "page of 32 tokens"]),
    ({"sparse_budget": 79}, {"hybrid": True, "block_size": 528}, ["from 80", "page of 16 tokens"]),
    ({"sparse_budget": -1}, {}, ["sparse_budget: -1", "from 80"]),
    ({"sparse_budget": 0}, {}, ["sparse_budget: 0", "from 80"]),
    ({"sparse_budget": "512"}, {}, ["sparse_budget: '512'", "whole numbers of tokens"]),
    ({"sparse_budget": 512.0}, {}, ["sparse_budget: 512.0", "whole numbers of tokens"]),
    ({"sparse_budget": True}, {}, ["sparse_budget: True", "whole numbers of tokens"]),
    ({"sparse_budget": [512]}, {}, ["sparse_budget: [512]", "whole numbers of tokens"]),
    ({"sparse_budget": None}, {}, ["sparse_budget: None", "whole numbers of tokens"]),
    ({"sparse": "false"}, {}, ["sparse: 'false'", "allowed: true, false"]),
    ({"sparse": 2}, {}, ["sparse: 2", "allowed: true, false"]),
    ({"sparse": 0.0}, {}, ["sparse: 0.0", "allowed: true, false"]),
    ({"sparse": None}, {}, ["sparse: None", "allowed: true, false"]),
    ({"sparse_budgets": 512}, {}, ["'sparse_budgets': unknown key", "Did you mean 'sparse_budget'?"]),
    ({"sparse_top_p": 0.9}, {}, ["'sparse_top_p': unknown key", "Allowed: sparse, sparse_budget"]),
    ({"sparse": False, "sparse_budget": 512}, {}, ["sparse_budget: 512 with sparse=false", "one of the two"]),
    ({"sparse_budget": 512}, {"decode_policy": "dense"}, ["sparse_budget: 512", "'dense'", "allowed: none"]),
    (
        {"sparse_budget": 512},
        {"budget_tokens": 1 << 30, "max_model_len": 1 << 20},
        ["sparse_budget: 512", f"budget_tokens={1 << 30}", "allowed: none"],
    ),
    (
        {"sparse": False},
        {"offload": {"host_gib": 1, "host_dtype": "fp8"}},
        ["sparse: false", "sparse.offload.host_dtype='fp8'", "allowed: true"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("extra_args, settings, said", WRONG, ids=lambda value: str(value)[:40])
def test_wrong_values_are_refused(extra_args, settings, said):
    with pytest.raises(RequestError) as refusal:
        check(extra_args, engine(**settings))
    assert isinstance(refusal.value, ValueError)
    for words in said:
        assert words in str(refusal.value)


def test_exact_attention_is_served_where_the_host_holds_what_the_cache_would():
    check({"sparse": False}, engine(offload={"host_gib": 1}))
    check({"sparse": False}, engine(offload={"host_gib": 1, "host_dtype": "fp8"}, cache_dtype="fp8"))
    check({"sparse": False}, engine(decode_policy="dense"))


def scheduled(new: dict, finished=()):
    requests = [
        SimpleNamespace(
            req_id=name, sampling_params=SimpleNamespace(extra_args=extra) if extra != "pooling" else None
        )
        for name, extra in new.items()
    ]
    return SimpleNamespace(scheduled_new_reqs=requests, finished_req_ids=set(finished))


class RunnerV1:
    def __init__(self):
        self.input_batch = SimpleNamespace(req_ids=[])

    def execute_model(self, output, intermediate=None):
        return self._build_attention_metadata(num_reqs=1, num_scheduled_tokens={"a": 1})

    def _dummy_run(self):
        return self._build_attention_metadata(num_reqs=1)

    def _build_attention_metadata(self, num_reqs, num_scheduled_tokens=None):
        return self.budgets.of_rows()


class RunnerV2:
    def __init__(self):
        self.input_batch = SimpleNamespace(req_ids=[], is_prefilling_np=None)
        self.model_state = SimpleNamespace(prepare_attn=lambda batch, *_: self.budgets.of_rows())

    def execute_model(self, output, intermediate=None, dummy_run=False):
        dummy = SimpleNamespace(req_ids=["req_0_1234"], is_prefilling_np=None)
        batch = dummy if dummy_run else self.input_batch
        return self.model_state.prepare_attn(batch, "full")

    def _dummy_run(self):
        return self.execute_model(scheduled({}), dummy_run=True)


@pytest.mark.parametrize("kind", [RunnerV1, RunnerV2])
def test_rows_are_those_of_the_step(kind):
    runner, budgets = kind(), RequestBudgets()
    runner.budgets = budgets
    budgets.follow(runner)
    runner.input_batch.req_ids = ["a", "b"]
    assert runner.execute_model(scheduled({"a": None, "b": "pooling"})) == []
    runner.input_batch.req_ids = ["c", "a", "d"]
    assert runner.execute_model(scheduled({"c": {"sparse_budget": 96}, "d": {"sparse": False}})) == [96, 0, EXACT]
    runner.input_batch.req_ids = ["a", "d"]
    assert runner.execute_model(scheduled({})) == [0, EXACT]
    assert runner._dummy_run() == [], "dummy rows have the default"
    assert budgets.of_rows() == [], "a builder of drafts, after the step"
    # A request that comes back, and another one of the same name.
    runner.input_batch.req_ids = ["d", "c"]
    again = scheduled({"d": {"sparse": False}, "c": {"sparse_budget": 112}}, finished="c")
    assert runner.execute_model(again) == [EXACT, 112]
    assert runner.execute_model(scheduled({"d": {}}, finished="dc")) == []


@pytest.mark.seam
def test_runners_of_this_vllm_build_metadata_there():
    """The names that are hooked exist, and take what is read of their arguments."""
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_states.interface import ModelState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    build = inspect.signature(GPUModelRunner._build_attention_metadata).parameters
    assert "num_scheduled_tokens" in build
    assert list(inspect.signature(ModelState.prepare_attn).parameters)[1] == "input_batch"
    assert {"req_ids", "is_prefilling_np"} <= set(InputBatch.__dataclass_fields__)
    assert compat.metadata_call(SimpleNamespace(model_state=0))[1] == "prepare_attn"


def test_salts_of_exact_requests_are_nobody_elses():
    """A client's salt may look like one of ours, by chance or on purpose."""
    from vllm_sparse.backend.requests import salt_of

    owns = [None, "", "bob", "sparse-exact-", "sparse-exact-bob", "sparse-other-sparse-exact-bob", "sparse-other-"]
    exact = {salt_of(own, exact=True) for own in owns[1:]}
    others = {salt_of(own, exact=False) for own in owns}
    assert len(exact) == len(owns) - 1 and len(others) == len(owns) and not exact & others
    assert salt_of("bob", exact=False) == "bob" and salt_of(None, exact=False) is None
