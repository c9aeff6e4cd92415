"""The demo's question and the report it reads from a server's log."""

import pytest

pytest.importorskip("tqdm", reason="pip install 'vllm-sparse[demo]'")

from vllm_sparse.tools.demo import smollm2, texts
from vllm_sparse.tools.demo.__main__ import attended_tokens

CONTEXT_TOKENS = 3000
PROMPT_OVERHEAD_TOKENS = 80


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.prepare())


@pytest.mark.model
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_needle_stands_once_at_its_depth(tokenizer, depth):
    """Needle stands once at its depth in a prompt of the right length."""
    messages, number = texts.needle_prompt(tokenizer, CONTEXT_TOKENS, depth)
    content = messages[0]["content"]
    needle = texts.NEEDLE.format(number=number)
    assert content.count(needle) == 1
    assert content.endswith(texts.QUESTION)
    assert content.index(needle) / len(content) == pytest.approx(depth, abs=0.05)
    num_tokens = len(tokenizer.encode(content))
    assert CONTEXT_TOKENS <= num_tokens <= CONTEXT_TOKENS + PROMPT_OVERHEAD_TOKENS


@pytest.mark.model
def test_prompt_depends_on_the_seed_alone(tokenizer):
    first, again, other = (texts.needle_prompt(tokenizer, 500, 0.5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first[1] != other[1]
    assert first[0][0]["content"] != other[0][0]["content"]


@pytest.mark.model
def test_too_much_context_is_refused(tokenizer):
    """More context than there are essays is refused."""
    with pytest.raises(ValueError, match="ask for at most"):
        texts.needle_prompt(tokenizer, 1_000_000, 0.5)


def test_attended_tokens_of_the_last_report():
    """Attended tokens are those of the last report."""
    log = "x\n(Worker pid=1) sparse attention: attended 10 of 20 tokens\n... attended 30 of 120 tokens (25.0%)"
    log += "\nsparse attention: attended 30 of 120 tokens (25.0%) in decode steps so far\nshutdown"
    assert attended_tokens(log) == (30, 120)


def test_attended_tokens_without_a_report():
    """Attended tokens of a log without a report are unknown."""
    assert attended_tokens("INFO: started") is None
