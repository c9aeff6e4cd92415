"""A KV cache of e4m3 in the engine: the answers of stock attention over K and V that were quantised and scaled."""

from __future__ import annotations

import json

import pytest
import tiny_engine
import tiny_model
import torch
from safetensors.torch import load_file, save_file
from test_models import model_of
from test_two_engines import start_request, step
from tiny_engine import outputs, prompts, tokens

from vllm_sparse import metrics
from vllm_sparse.errors import ConfigError
from vllm_sparse.pages.geometry import Geometry

pytestmark = pytest.mark.engine

EVERYTHING = {"budget_tokens": 2048}
FP8 = {"kv_cache_dtype": "fp8"}
K_SCALE, V_SCALE = 0.043, 0.29
LENGTHS = (40, 300, 700)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.make(tmp_path_factory.mktemp("models") / "llama", head_dim=64)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """The same model, which asks for an fp8 cache and has scales for it, other ones in each layer."""
    path = tiny_model.make(tmp_path_factory.mktemp("models") / "scaled", head_dim=64)
    write_scales(path, lambda layer, scale: torch.tensor([scale * (1 + layer)]))
    return path


def write_scales(path, of_layer) -> None:
    config, weights = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {}, "ignore": [], "kv_cache_scheme": scheme,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    for layer in range(config["num_hidden_layers"]):
        for name, scale in (("k_scale", K_SCALE), ("v_scale", V_SCALE)):
            weights[f"model.layers.{layer}.self_attn.{name}"] = of_layer(layer, scale)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def quantised_stock(tiny, model):
    """What stock answers with K and V as an fp8 cache holds them, by its own attention in float32.

    Few CPUs have what vLLM's own attention over such a cache needs.
    """
    from vllm.model_executor.layers.attention.attention import Attention

    known, original = {}, Attention.forward

    def answer(scales=lambda layer: (1.0, 1.0), model=model, **settings):
        def forward(self, query, key, value, *args, **kwargs):
            number = int(self.layer_name.split(".")[2])
            pair = [
                (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale
                for x, scale in zip((key, value), scales(number) or (1, 1), strict=True)
            ]
            return original(self, query, *(pair if scales(number) else (key, value)), *args, **kwargs)

        name = repr([model, settings, *map(scales, range(3))])
        if name not in known:
            Attention.forward = forward
            try:
                with tiny.start(model, backend="CPU_ATTN", **settings) as llm:
                    known[name] = tokens(llm, prompts(LENGTHS))
            finally:
                Attention.forward = original
        return known[name]

    answer()  # now, for an engine of a test runs alone
    return answer


def of_checkpoint(layer: int) -> tuple[float, float]:
    return K_SCALE * (1 + layer), V_SCALE * (1 + layer)


@pytest.mark.seam
def test_a_budget_of_the_context_gives_what_stock_gives(tiny, model, quantised_stock):
    """In chunks, out of the prefix cache, and beside other requests."""
    with tiny.start(model, EVERYTHING, **FP8) as llm:
        assert tokens(llm, prompts(LENGTHS)) == quantised_stock()
        again = outputs(llm, prompts(LENGTHS)[-1:])
        assert tiny_engine.cached_tokens(again) > [0]
        assert list(again[0].outputs[0].token_ids) == quantised_stock()[-1]
        (layer, *_) = tiny_engine.attention_layers(llm).values()
        assert tiny_engine.kv_cache(layer).shape[3] == 128 and tiny_engine.kv_cache(layer).element_size() == 1
    with tiny.start(model, backend="CPU_ATTN") as llm:
        assert tokens(llm, prompts(LENGTHS)) != quantised_stock(), "the cache was not quantised"


def test_a_model_in_16_bit(tiny, model, quantised_stock):
    """Token by token, each after stock's: where two are about as likely, rounding decides."""
    settings = {"dtype": "bfloat16"}
    answers = quantised_stock(**settings)
    starts = [
        prompt + answer[:n] for prompt, answer in zip(prompts(LENGTHS), answers, strict=True) for n in range(16)
    ]
    expected = torch.tensor(answers).flatten()
    with tiny.start(model, EVERYTHING, **FP8, **settings) as llm:
        found = torch.tensor(tokens(llm, starts, 1)).flatten()
    assert (found == expected).float().mean() > 0.85


@pytest.mark.seam
def test_scales_of_a_checkpoint(tiny, scaled, quantised_stock):
    """Taken from the checkpoint, which asks for the cache as well: nothing is named on the command line."""
    with tiny.start(scaled, EVERYTHING) as llm:
        found = tokens(llm, prompts(LENGTHS))
        scales = [layer.impl.geometry for layer in tiny_engine.attention_layers(llm).values()]
        first = next(iter(tiny_engine.attention_layers(llm).values()))
        llm.collective_rpc("reload_weights")
        assert tokens(llm, prompts(LENGTHS)) == found
        first._k_scale_float *= 2
        with pytest.raises(ConfigError, match=r"--kv-cache-dtype: .* scales .* model\.layers\.0"):
            from vllm_sparse.backend.hooks import check_scales

            check_scales(tiny_engine.engine_core(llm).model_executor.driver_worker.worker)
    for layer, one in enumerate(scales):
        assert (one.k_scale, one.v_scale) == pytest.approx(of_checkpoint(layer))
    assert found == quantised_stock(of_checkpoint) != quantised_stock()


def test_scales_of_every_head_are_refused(tiny, tmp_path):
    path = tiny_model.make(tmp_path / "heads", head_dim=64)
    write_scales(path, lambda layer, scale: torch.full((2,), scale))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["strategy"] = "attn_head"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="scales for every KV head"), tiny.start(path, EVERYTHING):
        pass


@pytest.mark.parametrize("policy", ["quest", "sketch", "sketch2", "twilight"])
def test_few_pages_are_attended(tiny, model, policy, quantised_stock):
    with tiny.start(model, {"decode_policy": policy}, **FP8) as llm:
        found, counts = tokens(llm, prompts(LENGTHS)), metrics.snapshot()
    assert 0 < counts["attended_tokens"] < 0.6 * counts["context_tokens"]
    assert found[0] == quantised_stock()[0] or policy == "twilight", "a context of one page is attended whole"


PREFILL = {"prefill_policy": "vertical_slash", "min_prefill_tokens": 128, "prefill_top_p": 0}
ALL = {"vertical_tokens": 1024, "slash_tokens": 1024}
FEW = {"vertical_tokens": 32, "slash_tokens": 64, "window_tokens": 32}


def test_sparse_prefill(tiny, model, quantised_stock):
    """Sizes that cover the context attend to it; smaller ones do not."""
    with tiny.start(model, {**EVERYTHING, **PREFILL, **ALL}, **FP8) as llm:
        assert tokens(llm, prompts(LENGTHS)) == quantised_stock()
    with tiny.start(model, {**EVERYTHING, **PREFILL, **FEW}, **FP8) as llm:
        tokens(llm, prompts(LENGTHS))
        counts = metrics.snapshot()
    assert 0 < counts["prefill_attended_pairs"] < 0.9 * counts["prefill_causal_pairs"]


@pytest.mark.seam
@pytest.mark.parametrize("host_dtype", ["auto", "fp8"])
def test_offload_gives_the_tokens_of_resident_pages(tiny, scaled, host_dtype):
    """The host holds codes as they are, whichever of its two names they are asked for by."""
    with tiny.start(scaled) as llm:
        resident = tokens(llm, prompts(LENGTHS))
    offload = {"host_gib": 0.05, "host_dtype": host_dtype, "hot_fraction": 0.02}
    with tiny.start(scaled, {"offload": offload}) as llm:
        found = tokens(llm, prompts(LENGTHS))
        layer = next(iter(tiny_engine.attention_layers(llm).values())).impl.pages.offloaded
        assert layer.host.dtype is torch.float8_e4m3fn and layer.exponents is None
        assert metrics.snapshot()["head_page_bytes"] == 32 * 2 * 64
    assert found == resident


@pytest.mark.seam
def test_layers_that_are_left_out_stay_in_16_bit_and_sparse(tiny, model, quantised_stock):
    settings = {**FP8, "kv_cache_dtype_skip_layers": ["1"]}
    with tiny.start(model, EVERYTHING, **settings) as llm:
        found = tokens(llm, prompts(LENGTHS))
        impls = [layer.impl for layer in tiny_engine.attention_layers(llm).values()]
        assert [impl.cache_dtype for impl in impls] == [torch.float8_e4m3fn, torch.float32, torch.float8_e4m3fn]
        assert all(impl.is_sparse for impl in impls)
    assert found == quantised_stock(lambda layer: None if layer == 1 else (1.0, 1.0))
    with tiny.start(model, None, **settings) as llm:
        tokens(llm, prompts(LENGTHS))
        counts = metrics.snapshot()
    assert counts["sparse_layers"] == 3 and 0 < counts["attended_tokens"] < 0.6 * counts["context_tokens"]


@pytest.mark.seam
def test_sliding_windows_that_are_left_out_beside_sparse_layers(tiny, quantised_stock, monkeypatch):
    """Blocks of codes are brought to the bytes of those of the windows."""
    from vllm.v1.attention.backends import cpu_attn

    # Stock goes by the dtype of the engine, and asks for a CPU that reads codes where it reads none.
    isa_of, build = cpu_attn._get_attn_isa, cpu_attn.CPUAttentionMetadataBuilder.build

    def build_auto(self, *args, **kwargs):
        self.kv_cache_dtype = "auto"
        return build(self, *args, **kwargs)

    monkeypatch.setattr(cpu_attn, "_get_attn_isa", lambda *given: isa_of(*given[:3], "auto"))
    monkeypatch.setattr(cpu_attn.CPUAttentionMetadataBuilder, "build", build_auto)
    model = model_of(tiny, "hybrid_of_several_groups")
    with tiny.start(model, EVERYTHING, **FP8, kv_cache_dtype_skip_layers=["sliding_window"]) as llm:
        found = tokens(llm, prompts(LENGTHS))
        sizes = [
            tiny_engine.kv_cache(layer).element_size() for layer in tiny_engine.attention_layers(llm).values()
        ]
        assert sizes == [4, 1, 1, 1, 1] and metrics.snapshot()["sparse_layers"] == 4
    assert found == quantised_stock(lambda layer: (1.0, 1.0) if layer else None, model)


def test_engines_of_two_dtypes_in_one_process(tiny, model):
    batch, alone = prompts((300, 40)), []
    for settings in ({}, FP8):
        with tiny.start(model, **settings) as llm:
            alone.append(tokens(llm, batch))
    assert alone[0] != alone[1], "nothing is tested"
    with tiny.start(model) as plain:
        tiny._running = False  # on purpose, as in test_two_engines
        with tiny.start(model, **FP8) as coded:
            engines, answers = [plain, coded], [{}, {}]
            for number, prompt in enumerate(batch):
                for llm in engines:
                    start_request(llm, number, prompt)
            while any([step(llm, answer) for llm, answer in zip(engines, answers, strict=True)]):
                pass
    assert [[answer[number] for number in range(len(batch))] for answer in answers] == alone


def test_layers_of_the_dense_policy(tiny, model, quantised_stock):
    """Pages without summaries."""
    with tiny.start(model, {"decode_policy": "dense"}, **FP8) as llm:
        assert tokens(llm, prompts(LENGTHS)) == quantised_stock()
        assert metrics.snapshot()["dense_layers"]


# What a GPU runs, as far as a CPU can tell.


class Stock:
    """What stands for an implementation of vLLM's and its metadata builder."""

    def __init__(self, codes_queries: bool = True, cache_config=None):
        self.supports_quant_query_input, self.cache_config = codes_queries, cache_config

    def forward(self, layer, query, key, value, kv, metadata, out):
        self.query, self.kv = query, kv


@pytest.mark.parametrize(
    "quantised, takes, coded", [(True, True, True), (True, False, False), (False, True, False)]
)
def test_stock_attention_gets_queries_as_it_wants_them(quantised, takes, coded):
    from vllm_sparse.backend.dense import StockDense

    stock = Stock(takes)
    geometry = Geometry(4, 2, 32, 16, 0.1).quantised(0.5, 2.0, 0.25) if quantised else Geometry(4, 2, 32, 16, 0.1)
    dense = StockDense(stock, geometry, quantised)
    query = torch.randn(5, 4, 64)[:, :, :32]  # rows lie apart, as beside K and V
    dense.rehearse(query)
    dense.attend(None, query, None, None, torch.zeros(1, 2, 17, 64), None, None)
    assert stock.kv.shape[2] == 16
    if coded:
        expected = (query / 0.25).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert stock.query.dtype is torch.float8_e4m3fn and torch.equal(stock.query.float(), expected.float())
    else:
        assert stock.query is query


def test_dense_rows_are_scheduled_by_the_dtype_of_their_layers():
    """FlashAttention schedules by what most layers of an engine have."""
    from types import SimpleNamespace

    from vllm_sparse.backend.dense import DenseBuilder

    engine = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype="fp8"))
    backend = SimpleNamespace(
        get_builder_cls=lambda: lambda spec, names, config, device: Stock(cache_config=config.cache_config)
    )
    for dtype in ("auto", "fp8"):
        builders = DenseBuilder(None, [], engine, None, backend, dtype)._builders
        assert {builder.cache_config.cache_dtype for builder in builders.values()} == {dtype}
    assert engine.cache_config.cache_dtype == "fp8"


def test_the_nearest_reader_reads_the_cache(monkeypatch):
    """FlashAttention reads codes in its third version alone, which GPUs before Hopper do not run."""
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    from vllm_sparse.backend.dense import _nearest_reader

    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **given: 2)
    for reads in (True, False):
        monkeypatch.setattr(
            FlashAttentionBackend, "supports_kv_cache_dtype", lambda dtype, reads=reads: reads or dtype == "auto"
        )
        names = [_nearest_reader(torch.bfloat16, 128, dtype, flash=True).get_name() for dtype in ("auto", "fp8")]
        assert names == ["FLASH_ATTN", "FLASH_ATTN" if reads else "TRITON_ATTN"]


def test_layers_of_each_dtype_rehearse_their_calls(tiny, model):
    with tiny.start(model, **FP8, kv_cache_dtype_skip_layers=["0"]) as llm:
        impls = [layer.impl for layer in tiny_engine.attention_layers(llm).values()]
        workspace, query = impls[0].workspace, torch.randn(64, 4, 64)
        assert all(impl.workspace is workspace for impl in impls)
        for impl in impls:
            impl.rehearse(query, torch.empty_like(query))
        assert workspace.rehearsed == {torch.float32: 64, torch.float8_e4m3fn: 64}
        assert workspace.rehearsed_tokens == 64
