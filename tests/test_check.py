"""`vllm-sparse check` says what an engine then does, without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_engine import ENGINE, SPARSE, engine_core

pytest.importorskip("vllm")

import test_families
import test_hybrids
import test_models
import tiny_model
from vllm import __version_tuple__

from benchmarks.shapes import model_of
from vllm_sparse import metrics
from vllm_sparse.tools import check, cli, stand_ins
from vllm_sparse.tools.check import EXIT, Status

ENGINE_OPTIONS = ("--dtype", "float32", "--block-size", "32", "--max-model-len", "1024", "--max-num-seqs", "4")
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def look_here():
    """To look at a new architecture's class, vLLM starts a process that imports vLLM: ten seconds each."""
    from vllm.model_executor.models import registry

    before, registry._run_in_subprocess = registry._run_in_subprocess, lambda look: look()
    yield
    registry._run_in_subprocess = before


@pytest.fixture
def llama(tmp_path):
    """The folder of a Llama of 8 billion parameters, of which there is a configuration alone."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def report(capfd, model, *arguments, vllm=(), status=Status.SPARSE) -> dict:
    """The JSON that is printed, with the right exit status and nothing around it."""
    command = ["check", model, "--json", *arguments, *(["--vllm-args", *vllm] if vllm else [])]
    assert cli.main([*map(str, command)]) == EXIT[status]
    found = json.loads(capfd.readouterr().out)
    assert (found["status"], found["exit_status"]) == (status.value, EXIT[status])
    return found


def text(capfd, model, *arguments, status=Status.SPARSE) -> str:
    assert cli.main(["check", str(model), *map(str, arguments)]) == EXIT[status]
    return capfd.readouterr().out


# Layers.


@pytest.mark.seam
@pytest.mark.parametrize("case", test_models.MODELS)
def test_layers_of_each_kind_are_what_engines_have(tiny, capfd, case):
    """The counts of ``test_models.py``, where engines are started."""
    sparse, dense, stock = test_models.MODELS[case][2:]
    status = Status.SPARSE if sparse else Status.NOTHING
    model = test_models.model_of(tiny, case)
    found = report(capfd, model, "--sparse", json.dumps(SPARSE), vllm=ENGINE_OPTIONS, status=status)
    layers = found["layers"]
    assert layers["sparse"] == sparse and layers["linear"] == 0
    for treatment, expected in (("dense", dense), ("stock", stock)):
        assert sorted(layers[treatment].values()) == sorted(expected.values())
        assert all(any(reason in told for told in layers[treatment]) for reason in expected)
    assert layers["attention"] == len(layers["each"]) == sparse + sum(dense.values()) + sum(stock.values())
    assert ("--attention-backend sparse" in found["serve"]) == bool(sparse)


@pytest.mark.parametrize("case", test_hybrids.MODELS)
def test_layers_of_states_are_no_attention_layers(tiny, capfd, case):
    model, options = test_hybrids.model_of(tiny, case)
    sparse = test_hybrids.MODELS[case][-1]
    options = ("--dtype", options["dtype"], "--max-model-len", "1024")
    found = report(
        capfd, model, "--gpu", 1, "--kv-gib", 0.25, "--sparse", json.dumps(SPARSE), vllm=options,
    )  # fmt: skip
    assert found["layers"]["sparse"] == found["layers"]["attention"] == sparse
    assert found["layers"]["linear"] > 0 and found["layers"]["block_size"] % 16 == 0
    # vLLM fits blocks to states in whole pages of what attends to them, which in stock is another backend.
    assert 0.8 < found["cache"]["sparse_tokens"] / found["cache"]["stock_tokens"] < 1.2


FIRST = {
    # Configs that say otherwise than by `layer_types` which layers attend to everything, or number them otherwise.
    "windows": ("llama", {
        "architecture": "DomynEdgeForCausalLM", "num_hidden_layers": 6,
        "window_sizes": [[64, 0], [64, 0], [-1, 0]] * 2, "position_layers": ["rope"] * 6},
        ["model.layers.2.attention.attn"]),
    "states": ("zamba2", test_families.MODELS["zamba2"].settings, ["model.attn.0"]),
}  # fmt: skip


@pytest.mark.seam
@pytest.mark.parametrize("case", FIRST)
def test_the_first_layers_are_dense_whatever_a_config_says_of_them(tiny, capfd, case):
    if case == "windows" and __version_tuple__ < (0, 33):
        pytest.skip("a newer vLLM builds this model")
    model_type, settings, expected = FIRST[case]
    model = tiny.model(model_type, **settings)
    for count in (1, 2):
        sparse = {**SPARSE, "dense_layers": count}
        found = report(
            capfd, model, "--sparse", json.dumps(sparse), status=Status.SPARSE if count == 1 else Status.NOTHING
        )
        dense = [layer["name"] for layer in found["layers"]["each"] if layer["runs"] == "dense"]
        assert (dense[:1], len(dense)) == (expected, count)


def engine_line(tiny, monkeypatch, model, sparse, **settings) -> tuple[str, int]:
    """What an engine logs of its layers at its start, and the tokens of its cache."""
    said = []
    for level in ("info", "warning"):
        monkeypatch.setattr(metrics.logger, level, lambda text, *values: said.append(text % values))
    with tiny.start(model, sparse, **settings) as llm:
        cache = engine_core(llm).vllm_config.cache_config
        held = cache.num_gpu_blocks * cache.block_size
    monkeypatch.undo()
    (line,) = (line for line in said if "attention layers sparse" in line)
    return line.partition(": ")[2], held


@pytest.mark.engine
@pytest.mark.seam
@pytest.mark.parametrize("case", ["llama", "llama_fp8", "windows", "nothing"])
def test_the_line_and_the_tokens_are_those_of_an_engine(tiny, capfd, monkeypatch, case):
    sparse, dtype = {"dense_layers": int(case.startswith("llama"))}, "fp8" if case == "llama_fp8" else "auto"
    model = tiny.model() if case.startswith("llama") else test_models.model_of(
        tiny, {"windows": "hybrid", "nothing": "sliding_window"}[case]
    )  # fmt: skip
    line, held = engine_line(tiny, monkeypatch, model, sparse, kv_cache_dtype=dtype)
    found = report(
        capfd, model, "--gpu", 1, "--kv-gib", ENGINE["kv_cache_memory_bytes"] / 2**30,
        "--sparse", json.dumps({**SPARSE, **sparse}), vllm=(*ENGINE_OPTIONS, "--kv-cache-dtype", dtype),
        status=Status.NOTHING if case == "nothing" else Status.SPARSE,
    )  # fmt: skip
    assert found["layers"]["line"] == line
    if case.startswith("llama"):
        assert found["cache"]["sparse_tokens"] == held


def test_an_older_vllm_is_told(llama, capfd, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version_tuple__", (0, 30, 0))
    assert "vllm-sparse serves 0.31 to" in report(capfd, llama, status=Status.ERROR)["reason"]


# Options, ranks and memory.


def test_cache_of_a_llama_by_hand(llama, capfd):
    """K and V of a token take 32 layers * 8 heads * 512 bytes; a page of 16 has 17 slots."""
    found = report(capfd, llama, "--gpu", 80, "--kv-gib", 40, "--sparse", '{"decode_policy": "quest"}')
    assert found["cache"]["stock_tokens"] == 40 << 13
    assert found["cache"]["sparse_tokens"] == (40 << 30) // (17 * 131072) * 16
    assert found["cache"]["weights_gib"] == round(8030261248 * 2 / 2**30, 3)
    two = report(
        capfd, llama, "--gpu", 80, "--kv-gib", 40, "--sparse", '{"decode_policy": "quest"}',
        vllm=("--tensor-parallel-size", 2, "--pipeline-parallel-size", 2),
    )  # fmt: skip
    assert two["cache"]["stock_tokens"] == 4 * found["cache"]["stock_tokens"]
    assert two["layers"]["attention"] == 32 and two["layers"]["sparse"] == found["layers"]["sparse"] == 30
    assert {layer["kv_heads"] for layer in two["layers"]["each"]} == {4}
    estimated = report(capfd, llama, "--gpu", 80)["cache"]
    assert estimated["estimated"] and 40 < estimated["kv_gib"] < 60 and estimated["fits"]
    small = text(capfd, llama, "--gpu", 24)
    assert "NOT ENOUGH for one request of 131,072 tokens" in small and "--max-model-len" in small
    assert "nothing is left for KV" in text(capfd, llama, "--gpu", 8)


def test_a_checkpoints_own_kv_cache_scheme_is_read(llama, capfd):
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    quantised = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "kv_cache_scheme": scheme,
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {**scheme, "strategy": "channel"},
            "input_activations": {**scheme, "strategy": "token", "dynamic": True}}},
        "ignore": ["lm_head"], "quantization_status": "compressed",
    }  # fmt: skip
    quest = ("--gpu", 80, "--kv-gib", 40, "--sparse", '{"decode_policy": "quest"}')
    (llama / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": quantised}))
    found = report(capfd, llama, *quest)
    assert found["layers"]["kv_dtype"] == "fp8" and found["cache"]["stock_tokens"] == 40 << 14
    assert found["cache"]["weights_gib"] < 9 or not found["cache"]["weights_exact"]
    named = report(capfd, llama, *quest, vllm=("--kv-cache-dtype", "bfloat16"))
    assert named["layers"]["kv_dtype"] == "bfloat16" and named["cache"]["stock_tokens"] == 40 << 13
    assert cli.main(["plan", str(llama), "--gpu", "80", "--kv-gib", "40", "--host", "64"]) == 0
    assert f"{40 << 14:,} tokens" in capfd.readouterr().out
    for unknown in ({"type": "int"}, {"strategy": "token"}):
        quantised["kv_cache_scheme"] = {**scheme, **unknown}
        (llama / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": quantised}))
        assert "cannot be used" in report(capfd, llama, status=Status.ERROR)["reason"], "by any backend of vLLM's"
    quantised["kv_cache_scheme"] = {**scheme, "strategy": "attn_head"}
    (llama / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": quantised}))
    assert "every KV head" in report(capfd, llama, status=Status.REFUSED)["reason"]


@pytest.mark.seam
def test_windows_have_the_blocks_of_a_gpu(capfd):
    """Blocks of 32 tokens, as stock layers have on a CPU, would double pages of 16 beside them."""
    cache = report(capfd, model_of("gpt-oss-20b", None), "--gpu", 80)["cache"]
    assert 0.9 * cache["stock_tokens"] < cache["sparse_tokens"] < cache["stock_tokens"]


@pytest.mark.seam
def test_stock_layers_may_have_caches_that_a_cpu_cannot_read(tiny, capfd):
    """Windows of gpt-oss over an fp8 cache: vLLM 0.33 refuses them where the CPU has no AVX-512."""
    options = (*ENGINE_OPTIONS, "--kv-cache-dtype", "fp8")
    found = report(capfd, test_models.model_of(tiny, "sinks"), "--sparse", json.dumps(SPARSE), vllm=options)
    assert found["layers"]["kv_dtype"] == "fp8" and sum(found["layers"]["stock"].values()) > 0


REFUSED = {
    "kv_dtype": (("--kv-cache-dtype", "fp8_e5m2"), (), "--kv-cache-dtype: 'fp8_e5m2'"),
    "connector": (
        ("--kv-transfer-config", '{"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}'), (),
        "kv_connector 'LMCacheConnectorV1'",
    ),
    "block_size": (("--block-size", "272"), (), "--block-size: 272"),
    "dbo": (("--enable-dbo",), (), "--enable-dbo: True"),
    "setting": ((), ("--sparse", '{"budget": 3}'), "unknown key 'budget'"),
    "offload_of_two_dtypes": (
        ("--kv-cache-dtype", "fp8", "--kv-cache-dtype-skip-layers", "0"), ("--sparse", '{"offload": {}}'),
        "layers of this model differ in KV heads, head size or dtype",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_engines_have_a_status_of_their_own(llama, capfd, case):
    vllm, arguments, said = REFUSED[case]
    found = report(capfd, llama, *arguments, vllm=vllm, status=Status.REFUSED)
    assert said in found["reason"] and "--attention-backend" not in found["serve"]
    assert found["versions"]["supported"]


def test_layers_that_cannot_offload_are_told_before_a_start(tiny, tmp_path, capfd):
    offload = ("--sparse", '{"offload": {}}')
    windows = report(capfd, test_models.model_of(tiny, "hybrid"), *offload, status=Status.REFUSED)
    assert "do not run sparse and cannot offload" in windows["reason"]
    bert = tiny_model.describe(tmp_path / "bert", "bert", "BertModel", max_position_embeddings=512)
    assert "no layer of this rank" in report(capfd, bert, *offload, status=Status.REFUSED)["reason"]
    assert cli.main(["plan", str(bert), "--gpu", "24", "--host", "8"]) == 0
    assert "offload does not start: sparse.offload: no layer of this rank" in capfd.readouterr().out


def test_layers_left_out_of_an_fp8_cache_have_the_blocks_of_a_gpu(tiny, capfd):
    """On a GPU vLLM fits the size of blocks to both dtypes, so that no memory is padded away."""
    options = (*ENGINE_OPTIONS[:2], "--kv-cache-dtype", "fp8", "--kv-cache-dtype-skip-layers", "sliding_window")
    found = report(
        capfd, test_models.model_of(tiny, "sinks"), "--gpu", 24, "--kv-gib", 1, "--sparse", json.dumps(SPARSE),
        vllm=options,
    )  # fmt: skip
    assert 0.8 < found["cache"]["sparse_tokens"] / found["cache"]["stock_tokens"] < 1
    assert not any("--block-size" in advised for advised in found["set"])


WRONG = {
    "unknown option": (("--vllm-args", "--kv-cash-dtype", "fp8"), "--vllm-args: unrecognized arguments"),
    "value": (("--vllm-args", "--max-model-len", "many"), "--vllm-args: "),
    "another model": (("--vllm-args", "--model", "gpt2"), "they name a model"),
    "backend": (("--vllm-args", "--attention-backend", "FLASH_ATTN"), "--attention-backend: 'flash_attn'"),
    "twice": (
        ("--sparse", "{}", "--vllm-args", "--additional-config", '{"sparse": {}}'), "--sparse: --vllm-args have",
    ),
    "quotes": (("--vllm-args", "--dtype 'float16"), "cannot be split"),
    "context": (("--vllm-args", "--max-model-len", "9000000"), "MODEL: "),
    "no object": (("--vllm-args", "--additional-config", "[1]"), "additional_config: '[1]': Input"),
    "kv": (("--gpu", "8", "--kv-gib", "9"), "--kv-gib: 9 of --gpu 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(llama, capfd, case):
    arguments, said = WRONG[case]
    if case == "kv":
        assert said in text(capfd, llama, *arguments)
        return
    assert cli.main(["check", str(llama), *arguments]) == 1
    assert said in capfd.readouterr().err


def test_offline_a_missing_model_is_no_wrong_option(monkeypatch, capfd):
    """vLLM looks for the model where it reads options then."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for more in ((), ("--vllm-args", "--max-model-len", "4096")):
        assert cli.main(["check", "./nowhere", *more]) == 1
        assert "MODEL: './nowhere' cannot be used: there is no such directory" in capfd.readouterr().err


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no such"}', "[]"])
def test_models_that_are_none(tmp_path, capfd, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    found = report(capfd, tmp_path, status=Status.ERROR)
    assert found["reason"].startswith("MODEL: ") and found["layers"] == {}


def test_a_serve_line_may_be_pasted(llama, capfd):
    """Options of the server, too, as words or in one text."""
    words = ["--port", "8001", "--kv-cache-dtype", "fp8", "--additional-config", '{"sparse": {"dense_layers": 0}}']
    found = report(capfd, llama, vllm=words)
    assert found["layers"]["sparse"] == 32 and found["layers"]["kv_dtype"] == "fp8"
    assert found["serve"].startswith(f"vllm serve {llama} --attention-backend sparse --port 8001 ")
    one = report(capfd, llama, "--vllm-args", "--port 8001 --kv-cache-dtype fp8 -tp 2")
    assert {layer["kv_heads"] for layer in one["layers"]["each"]} == {4}


def test_the_help_has_every_exit_status(capfd):
    with pytest.raises(SystemExit):
        cli.main(["check", "--help"])
    told = " ".join(capfd.readouterr().out.split())
    assert all(f"{number}," in told for number in (*EXIT.values(), 2)) and len(set(EXIT.values())) == len(EXIT)


# From which context it pays.


def test_without_a_gpu_a_forecast_is_called_one(llama, capfd):
    quest = ("--sparse", '{"decode_policy": "quest"}')
    told = text(capfd, llama, *quest)
    assert "FORECAST, not measured here" in told and "NVIDIA" in told and "pays from about" in told
    assert "no GPU here; --gpu GIB" in told and "kernel torch: can run here" in told
    assert "kernel triton: needs a GPU" in told or torch.cuda.is_available()
    pays = report(capfd, llama, *quest)["pays"]
    assert pays["measured"] is False and 4096 < pays["from_tokens"] < 65536
    gains = [point["stock_us"] - point["sparse_us"] for point in pays["points"]]
    assert gains == sorted(gains) and pays["points"][-1]["context_tokens"] == 131072
    coded = report(capfd, llama, *quest, vllm=("--kv-cache-dtype", "fp8"))["pays"]
    assert coded["from_tokens"] > pays["from_tokens"], "half the bytes are read as fast at twice the context"


@pytest.mark.parametrize(
    "longest, advised",
    [
        (2048, "sparse.min_context_tokens and sparse.budget_tokens"),
        (4096, "sparse.min_context_tokens"),
        (16384, ""),
    ],
)
def test_what_keeps_contexts_whole_is_named(llama, capfd, longest, advised):
    found = report(capfd, llama, vllm=("--max-model-len", longest))["set"]
    said = [each.split(" below ")[0] for each in found if "are attended whole" in each]
    assert said == ([advised] if advised else [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_measuring_needs_a_gpu(llama, capfd):
    assert cli.main(["check", str(llama), "--measure"]) == 1
    assert "--measure: needs a GPU" in capfd.readouterr().err


def test_a_build_for_gpus_on_a_machine_without_one():
    """vLLM finds no device there, and everything it plans is planned for a CPU."""
    program = (
        "from vllm import platforms\n"
        "from vllm.platforms.interface import UnspecifiedPlatform\n"
        "platforms._current_platform = UnspecifiedPlatform()\n"
        "from vllm_sparse.tools import dry_engine\n"
        "dry_engine.settle_platform()\n"
        "assert platforms.current_platform.is_cpu() and dry_engine.on_cpu()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=200)


def test_nothing_is_left_behind(llama, capfd):
    """What stands in for groups of ranks is taken away again, and no tensor of the meta device is shared with
    other models, so that an engine can start in this process."""
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    names = [name for name in (*stand_ins.GROUPS, *stand_ins.OTHER_GROUPS) if hasattr(parallel_state, name)]
    before = [getattr(parallel_state, name) for name in names]
    shared = dict(_ROPE_DICT)
    report(capfd, llama)
    assert [getattr(parallel_state, name) for name in names] == before
    assert shared == _ROPE_DICT


def test_the_page_names_every_part_of_the_report():
    page = (Path(__file__).parent.parent / "docs" / "check.md").read_text()
    for key in check.Report("", Status.SPARSE).to_json():
        assert f"`{key}`" in page
    for number in EXIT.values():
        assert f"| {number} |" in page
