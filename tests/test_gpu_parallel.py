"""Tensor parallel on two GPUs in bf16, by mp and by ray: what one GPU says, within rounding."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]

LENGTHS = (3000, 2500, 700, 40)
ENGINE = dict(
    dtype="bfloat16", max_model_len=4096, max_num_seqs=8, max_num_batched_tokens=1024,
    kv_cache_memory_bytes=256 << 20, gpu_memory_utilization=0.1, block_size=16, disable_log_stats=True,
    enable_prefix_caching=False,
)  # fmt: skip
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
SPARSE = {"budget_tokens": 512, "min_context_tokens": 1024, "dense_layers": 1}
EVERYTHING = {**SPARSE, "budget_tokens": 4096}
NEAR = 0.2
"""Natural logarithm: bf16 rounds sums of another order apart by a few hundredths here, while tokens that
have nothing to do with each other differ by whole head pages."""
LOGPROBS = 8


@pytest.fixture(autouse=True)
def spawned_workers(monkeypatch):
    """A fork of a process that has asked for GPUs cannot use them."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A function from a number of KV heads to the path of a random model with them."""
    pytest.importorskip("vllm")
    import tiny_model

    root = tmp_path_factory.mktemp("models")

    def make(kv_heads: int):
        return tiny_model.make(
            root / f"llama-{kv_heads}", hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=128, initializer_range=0.05,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def one_gpu(model):
    """Greedy outputs on one GPU, each computed once."""
    known: dict[str, list] = {}

    def run(kv_heads: int, sparse: dict | None = None):
        name = repr((kv_heads, sparse))
        if name not in known:
            known[name] = answer(model(kv_heads), sparse, enforce_eager=True)[0]
        return known[name]

    return run


def answer(path, sparse: dict | None, **settings) -> tuple[list, list[dict]]:
    """Greedy outputs, and what each worker counted, of an engine in a process of its own: one that ends
    with its engine in it leaves no queue or GPU memory to wait for."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run_engine, str(path), sparse, settings).result()


def run_engine(path: str, sparse: dict | None, settings: dict) -> tuple[list, list[dict]]:
    import tiny_engine
    from vllm import LLM, SamplingParams

    if sparse is not None:
        settings |= {"attention_backend": "sparse", "additional_config": {"sparse": sparse}}
    llm = LLM(path, **ENGINE, **settings)
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logprobs=LOGPROBS)
    batch = [{"prompt_token_ids": tokens} for tokens in tiny_engine.prompts(LENGTHS)]
    found = [output.outputs[0] for output in llm.generate(batch, params, use_tqdm=False)]
    counts = [] if sparse is None else llm.collective_rpc("sparse_metrics")
    llm.llm_engine.engine_core.shutdown()
    return found, counts


def assert_within_rounding(found, expected, least: int) -> None:
    """Each token is as likely in both, up to where two tokens tie and the texts part; ``least`` tokens agree."""
    agree = 0
    for mine, other in zip(found, expected, strict=True):
        for i, (a, b) in enumerate(zip(mine.token_ids, other.token_ids, strict=True)):
            ours, theirs = mine.logprobs[i], other.logprobs[i]
            assert a in theirs and b in ours, f"token {i}: {a}, not {b}"
            off = max(abs(ours[token].logprob - theirs[token].logprob) for token in (a, b))
            assert off < NEAR, f"token {i}: {a} and {b} are {off} off"
            if a != b:
                break
            agree += 1
    total = sum(len(output.token_ids) for output in expected)
    print(f"{agree} of {total} tokens agree")
    assert agree >= least, f"{agree} of {total} tokens agree"


def assert_counts(workers, sparse: bool) -> None:
    assert len(workers) == 2
    assert workers[0] == workers[1], "both attend to the same number of tokens, each for its heads"
    assert workers[0]["sparse_layers"] == 3 and workers[0]["dense_layers"] == {"dense_layers=1": 1}
    attended, context = workers[0]["attended_tokens"], workers[0]["context_tokens"]
    assert (0 < attended < 0.5 * context) if sparse else (0 < attended == context)


def test_mp_with_graphs(model, one_gpu):
    """Two ranks on mp with graphs and a budget of everything answer as stock on one GPU."""
    found, workers = answer(
        model(2), EVERYTHING, compilation_config=GRAPHS, tensor_parallel_size=2,
        distributed_executor_backend="mp",
    )  # fmt: skip
    assert_counts(workers, sparse=False)
    assert_within_rounding(found, one_gpu(2), 20)


@pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")
def test_ray_with_a_small_budget(model, one_gpu):
    """Two ray workers with a small budget answer as sparse attention on one GPU."""
    found, workers = answer(
        model(2), SPARSE, enforce_eager=True, tensor_parallel_size=2, distributed_executor_backend="ray"
    )
    assert_counts(workers, sparse=True)
    assert_within_rounding(found, one_gpu(2, SPARSE), 20)


def test_one_kv_head_on_two_gpus(model, one_gpu):
    """One KV head on two GPUs gives the answers of stock on one."""
    found, workers = answer(
        model(1), EVERYTHING, enforce_eager=True, tensor_parallel_size=2, distributed_executor_backend="mp"
    )
    assert_counts(workers, sparse=False)
    assert_within_rounding(found, one_gpu(1), 20)


def test_expert_parallel(tmp_path):
    """Two ranks, each with half of the experts and of the heads, answer as stock on one GPU.

    Every token goes to all experts: which two it likes best may depend on what bf16 rounds.
    """
    pytest.importorskip("vllm")
    import tiny_model

    model = tiny_model.make(
        tmp_path, "qwen3_moe", hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, initializer_range=0.05, num_experts=4, num_experts_per_tok=4,
        moe_intermediate_size=256, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
    )  # fmt: skip
    expected = answer(model, None, enforce_eager=True)[0]
    found, workers = answer(
        model, EVERYTHING, enforce_eager=True, tensor_parallel_size=2, distributed_executor_backend="mp",
        enable_expert_parallel=True,
    )  # fmt: skip
    assert_counts(workers, sparse=False)
    assert_within_rounding(found, expected, 10)
