"""Tokenizers, texts and rows for tests of `vllm-sparse eval`."""

from __future__ import annotations

from vllm_sparse.tools.eval.tasks import TEXT


class Letters:
    """A tokenizer of one token per character."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]


def words(count: int) -> list[str]:
    return ["".join(chr(97 + int(digit)) for digit in f"{number:05}") for number in range(count)]


def running_text(sentences: int = 3000) -> str:
    """Different sentences of different words."""
    names = words(4 * sentences)
    return "".join(f"The {' '.join(names[i : i + 4])} was there. " for i in range(0, 4 * sentences, 4))


class Chat(Letters):
    """Letters, and a template whose last message may be continued."""

    chat_template = "yes"
    all_special_ids = (ord("<"),)

    def apply_chat_template(
        self, messages, tokenize, continue_final_message=False, add_generation_prompt=False, **_
    ):
        text = "".join(f"<{message['role']}>{message['content']}</>" for message in messages)
        return text.removesuffix("</>") if continue_final_message else text + "<assistant>" * add_generation_prompt


def row(policy: str = "quest", budget: int | None = 256, task: str = TEXT, length: int = 4096, **values) -> dict:
    own = {
        "vllm": "1", "torch": "2", "model": "m<1>", "device": "cpu", "dtype": "float32", "kv_dtype": "float32",
        "page_size": 16, "split": "dev", "score_tokens": 8, "task": task, "length": length, "seed": 0,
        "policy": policy, "budget": budget, "prefill_policy": "dense", "top_p": None, "attended": 0.5,
    }  # fmt: skip
    return own | values


def text_row(policy: str, budget: int | None, length: int, kl: float) -> dict:
    recall = None if policy == "dense" else [[0.5, 0.7], [0.9, 0.8], [0.6, 1.0]]
    return row(policy, budget, length=length, loss=2 + kl, dense_loss=2.0, kl=kl, same_top=0.9, recall=recall,
               mass=recall, layers=[2, 3, 4])  # fmt: skip


def some_rows() -> list[dict]:
    rows = [text_row("dense", None, length, 0.0) for length in (4096, 8192)]
    for policy, scale in (("quest", 3.0), ("streaming", 30.0)):
        rows += [
            text_row(policy, budget, length, scale * length**0.5 / budget)
            for length in (4096, 8192)
            for budget in (256, 512, 1024)
        ]
    for depth in (0.0, 1.0):
        rows.append(row("dense", None, "niah_single", depth=depth, score=1.0))
        rows.append(row(task="niah_single", depth=depth, score=depth))
    return rows
