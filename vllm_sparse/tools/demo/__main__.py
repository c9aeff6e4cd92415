"""`python -m vllm_sparse.tools.demo`: a real model finds a number in long essays, attending to part of them."""

import argparse
import json
import re
import shlex
import signal
import sys
import time

from vllm_sparse.model_files import cache_root
from vllm_sparse.tools.demo.server import Server, elapsed
from vllm_sparse.tools.demo.smollm2 import prepare
from vllm_sparse.tools.demo.texts import needle_prompt

ATTENDED = re.compile(r"sparse attention: attended (\d+) of (\d+) tokens")
ANSWER_TOKENS = 24
# Enough decode steps to time one, and for the workers to log what they attended.
TIMED_TOKENS = 64


def main() -> int:
    arguments = _parser().parse_args()
    # A plain SIGTERM would skip the `with` block that ends the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("The demo was terminated."))
    try:
        return _run(arguments)
    except (RuntimeError, ValueError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    import torch
    from transformers import AutoTokenizer

    model = prepare()
    tokenizer = AutoTokenizer.from_pretrained(model)
    where = arguments.context_tokens, arguments.depth
    messages, number = needle_prompt(tokenizer, *where, seed=arguments.seed)
    options = _server_options(arguments)
    log_path = cache_root() / "demo-server.log"
    _report("server", f"vllm serve {model.name} {shlex.join(options)}")
    with Server(model, options, log_path, on_gpu=torch.cuda.is_available()) as server:
        essay, _, question = messages[0]["content"].rpartition("\n\n")
        essay_tokens = len(tokenizer.encode(essay))
        _report("essay", f"{essay_tokens:,} tokens, {number} hidden {arguments.depth:.0%} into them")
        _report("question", question)
        answer, first_token_s = _ask(server, messages)
        token_s = _time_per_token(server, messages)
        attended = attended_tokens(server.log())
    right = number in answer
    _report("result", "right" if right else f"WRONG: the number is {number}")
    if attended is not None:
        chosen, context = attended
        share = f"{chosen / context:.1%}"
        _report("attended", f"{chosen:,} of {context:,} context tokens over the first decode steps, {share}")
    _report("time", f"{first_token_s:.1f} s to the first token, {1000 * token_s:.0f} ms for each further one")
    return 0 if right else 1


def attended_tokens(log: str) -> tuple[int, int] | None:
    """Attended tokens and context tokens from the last report in a server's log; None without one."""
    reports = ATTENDED.findall(log)
    if not reports:
        return None
    attended, context = map(int, reports[-1])
    return attended, context


def _ask(server: Server, messages: list[dict]) -> tuple[str, float]:
    """Print the answer as it comes; return it and the seconds to its first token."""
    start = time.perf_counter()
    pieces = server.stream_chat(messages, max_tokens=ANSWER_TOKENS, stop=["\n"])
    with elapsed("reading the essay"):
        answer = next(pieces, "")
    first_token_s = time.perf_counter() - start
    print(f"{'answer':10}{messages[-1]['content']}{answer}", end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
        answer += piece
    print()
    return answer, first_token_s


def _time_per_token(server: Server, messages: list[dict]) -> float:
    """Seconds of a decode step. The essay is in the prefix cache now, and an answer would be too short."""
    pieces = server.stream_chat(messages, max_tokens=TIMED_TOKENS, ignore_eos=True)
    with elapsed("timing"):
        next(pieces, "")
        start = time.perf_counter()
        for _ in pieces:
            pass
    return (time.perf_counter() - start) / (TIMED_TOKENS - 1)


def _server_options(arguments: argparse.Namespace) -> list[str]:
    options = ["--max-model-len", "8192"]
    if arguments.backend == "stock":
        return options
    # By default contexts of this length are short, and read densely.
    config = {"sparse": {"budget_tokens": arguments.budget_tokens, "min_context_tokens": arguments.budget_tokens}}
    options += ["--attention-backend", arguments.backend, "--block-size", "16"]
    return [*options, "--additional-config", json.dumps(config)]


def _report(title: str, text: str) -> None:
    print(f"{title:10}{text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_sparse.tools.demo", description=__doc__.partition(": ")[2], allow_abbrev=False
    )
    parser.add_argument("--backend", default="sparse", help="attention backend; 'stock' is vLLM's own choice")
    parser.add_argument("--budget-tokens", type=int, default=1024, help="tokens attended in a decode step")
    parser.add_argument("--context-tokens", type=int, default=6200, help="length of the essay, at most 8,000")
    parser.add_argument("--depth", type=float, default=0.5, help="place of the number: 0 is first, 1 is last")
    parser.add_argument("--seed", type=int, default=0, help="another essay and another number")
    return parser


if __name__ == "__main__":
    sys.exit(main())
