"""Which pages each decode policy chooses from a real model's keys, against the exact choice, on any machine.

    python -m benchmarks.selectors                       # reported texts, every policy
    python -m benchmarks.selectors --split dev --policies quest sketch2

A passage of essays, one of Python sources and needles in essays go through SmolLM2-135M. The queries of their
last tokens then choose pages in every layer through the project's own summaries, scores and selection (the
torch references of its kernels). Compared are, by budget:

mass     attention on the chosen pages that are not forced, as a share of what the oracle's choice holds
l2       relative error of the attention output
recall   needle pages that hold at least a tenth of a KV head's attention, and were chosen

Texts and needles are split in two halves: whoever chooses a setting looks at ``dev``, and ``report`` is what is
published. Appends a JSON line per text, policy and budget.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import results
from vllm_sparse.config import SparseConfig
from vllm_sparse.kernels import reference
from vllm_sparse.pages.decode_plan import DecodePlan
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.layout import HeadPageGrid
from vllm_sparse.pages.page_scores import PageScores
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.selection import Selection
from vllm_sparse.pages.summaries import summary_bytes_read, summary_slots
from vllm_sparse.policies import DECODE_POLICIES

PAGE = 16
FIRST_SEED = {"dev": 0, "report": 1000}
SOURCES = {"dev": ("argparse", "pathlib"), "report": ("tarfile", "zipfile")}
"""Modules of Python's standard library, whose text depends on its version."""
NEEDLE_DEPTHS = (0.15, 0.4, 0.65)
NEEDLE_SHARE = 0.1
"""Of a KV head's attention, from which on a page of the needle counts as looked for."""


@dataclass
class Layer:
    """What attention sees in one layer: key and value [kv_heads, tokens, head_dim], query [positions, q_heads,
    head_dim], all after RoPE."""

    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor


@dataclass
class Text:
    """Tokens, whose last ``queries`` ask, and the span of the needle's tokens where there is one."""

    name: str
    tokens: list[int]
    queries: int
    needle: range | None = None


@dataclass
class Sums:
    """Running sums over layers, positions and heads."""

    mass: float = 0.0
    oracle_mass: float = 0.0
    ratio: float = 0.0
    l2: float = 0.0
    rows: int = 0
    needle_pages: int = 0
    needle_pages_chosen: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # An adaptive policy takes the pages of its summary, but fewer: not to be compared at equal budgets.
    scoring = [name for name, policy in DECODE_POLICIES.items() if name != "dense" and not policy.adaptive]
    parser.add_argument("--policies", nargs="*", default=scoring, choices=scoring)
    parser.add_argument("--split", choices=FIRST_SEED, default="report")
    parser.add_argument("--budgets", nargs="*", type=int, default=[128, 256, 512, 1024])
    parser.add_argument("--context", type=int, default=5000, help="tokens of each text")
    parser.add_argument("--queries", type=int, default=8, help="last tokens of a passage that ask")
    parser.add_argument("--needles", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for what the model computed, to be read by a next run")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    from vllm_sparse.tools.demo import smollm2

    path = smollm2.prepare()
    tokenizer = AutoTokenizer.from_pretrained(path)
    environment = results.environment() | {"python": platform.python_version()}
    needles = {}
    print(f"{'text':>9} {'policy':>10} {'budget':>7} {'mass':>7} {'ratio':>7} {'l2':>7} {'recall':>7}")
    for text in [*passages(tokenizer, args), *needle_texts(tokenizer, args)]:
        start = time.perf_counter()
        layers = states(path, text, args)
        print(
            f"{text.name:>9} {len(text.tokens):,} tokens, {time.perf_counter() - start:.0f} s of model", flush=True
        )
        found = measure(layers, text, args)
        kind = "needles" if text.needle else text.name
        if kind == "needles":
            for key, sums in found.items():
                needles[key] = add(needles[key], sums) if key in needles else sums
            found = needles if text.name == f"needle{args.needles - 1}" else {}
        rows = [
            row_of(environment, path.name, kind, args, policy, budget, sums)
            for (policy, budget), sums in found.items()
        ]
        for row in rows:
            found = " ".join(
                f"{row[key]:7.3f}" for key in ("mass", "ratio", "l2", "recall") if row[key] is not None
            )
            print(f"{kind:>9} {row['policy']:>10} {row['budget']:>7} {found}", flush=True)
        results.append("selectors", rows, args.out)


def passages(tokenizer, args) -> list[Text]:
    """Essays and Python sources, from the half of this split."""
    from vllm_sparse.tools.demo.texts import essays

    tokens = tokenizer.encode(essays(), add_special_tokens=False, verbose=False)
    opening, half = tokenizer.encode(""), len(tokens) // 2
    size = args.context - len(opening)
    first = half if args.split == "report" else 0
    source = "\n".join(inspect.getsource(importlib.import_module(name)) for name in SOURCES[args.split])
    code = tokenizer.encode(source, add_special_tokens=False, verbose=False)
    if size > min(half, len(code)):
        raise SystemExit(f"--context {args.context}: the texts have {min(half, len(code)):,} tokens")
    return [
        Text("essays", opening + tokens[first : first + size], args.queries),
        Text("code", opening + code[:size], args.queries),
    ]


def needle_texts(tokenizer, args) -> list[Text]:
    """Prompts with a number hidden in essays; the queries are those that spell the right answer."""
    from vllm_sparse.tools.demo.texts import NEEDLE, needle_prompt

    texts = []
    for i in range(args.needles):
        depth, seed = NEEDLE_DEPTHS[i % len(NEEDLE_DEPTHS)], FIRST_SEED[args.split] + i
        messages, number = needle_prompt(tokenizer, args.context - 100, depth, seed=seed)
        prompt = (
            tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True) + f" {number}"
        )
        encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in encoded["offset_mapping"]]
        begin = prompt.index(NEEDLE.format(number=number))
        span = range(
            sum(end <= begin for end in ends),
            sum(end <= begin + len(NEEDLE.format(number=number)) for end in ends),
        )
        answer = sum(end > len(prompt) - len(number) for end in ends)
        # The last query is that of the last digit but one: each asks for the token after it.
        texts.append(Text(f"needle{i}", encoded["input_ids"][:-1], answer, span))
    return texts


def states(path: Path, text: Text, args) -> list[Layer]:
    """Keys, values and the asking queries of every layer."""
    kept = None
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
        kept = args.keep / f"{args.split}-{text.name}-{len(text.tokens)}-{text.queries}.pt"
        if kept.exists():
            return [Layer(*layer) for layer in torch.load(kept)]
    from transformers import AttentionInterface, AutoModelForCausalLM

    layers: dict[int, Layer] = {}

    def attend(module, query, key, value, attention_mask, scaling, **_):
        layers[module.layer_idx] = Layer(key[0], value[0], query[0, :, -text.queries :].transpose(0, 1).clone())
        group = query.shape[1] // key.shape[1]
        behind = key.shape[2] - query.shape[2]
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(behind)
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            attn_mask=mask,
            scale=scaling,
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("recorded", attend)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="recorded")
    cache = None
    with torch.inference_mode():
        # The last chunk holds all queries that ask.
        cut = [*range(0, len(text.tokens) - text.queries, 1024), len(text.tokens) - text.queries, len(text.tokens)]
        for start, end in itertools.pairwise(cut):
            chunk = torch.tensor([text.tokens[start:end]])
            cache = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    found = [Layer(layer.key.clone(), layer.value.clone(), layer.query) for _, layer in sorted(layers.items())]
    if kept is not None:
        torch.save([(layer.key, layer.value, layer.query) for layer in found], kept)
    return found


def measure(layers: list[Layer], text: Text, args) -> dict[tuple[str, int], Sums]:
    """Sums of every policy and budget over the layers that are sparse by default."""
    sums = {(policy, budget): Sums() for policy in args.policies for budget in args.budgets}
    for layer in layers[SparseConfig.dense_layers :]:
        measure_layer(layer, text, args, sums)
    return sums


def measure_layer(layer: Layer, text: Text, args, sums) -> None:
    queries, q_heads, head_dim = layer.query.shape
    kv_heads, tokens, _ = layer.key.shape
    pages, group, scale = -(-tokens // PAGE), q_heads // kv_heads, head_dim**-0.5
    seq_lens = torch.arange(tokens - queries + 1, tokens + 1)
    logits = layer.query.view(queries, kv_heads, group, -1) @ layer.key.transpose(1, 2) * scale
    logits.masked_fill_(torch.arange(tokens) >= seq_lens[:, None, None, None], float("-inf"))
    weights = logits.softmax(-1)
    exact = weights @ layer.value
    padded = torch.nn.functional.pad(weights, (0, pages * PAGE - tokens))
    page_mass = (
        padded.unflatten(-1, (pages, PAGE)).sum(-1).mean(2)
    )  # [queries, kv_heads, pages], mean of the group
    config = SparseConfig()
    first_recent = (seq_lens - config.window_tokens).clamp(min=0) // PAGE
    page = torch.arange(pages)
    forced = (page < config.sink_pages(PAGE)) | (page >= first_recent[:, None])
    free = page_mass.masked_fill(forced[:, None], 0)
    needle = torch.zeros(pages, dtype=torch.bool)
    if text.needle:
        needle[text.needle.start // PAGE : (text.needle.stop - 1) // PAGE + 1] = True
    looked_for = needle & (page_mass >= NEEDLE_SHARE) & ~forced[:, None]
    best, scored = {}, None
    for budget in args.budgets:
        scored, best[budget] = chosen_pages(layer, "oracle", budget, seq_lens, scale, scored)
    for policy in args.policies:
        scored = None
        for budget in args.budgets:
            scored, chosen = chosen_pages(layer, policy, budget, seq_lens, scale, scored)
            mass, most = (free * chosen).sum(-1), (free * best[budget]).sum(-1)
            kept = weights * chosen.repeat_interleave(PAGE, -1)[:, :, None, :tokens]
            out = kept @ layer.value / kept.sum(-1, keepdim=True)
            total = sums[policy, budget]
            total.mass += mass.sum().item()
            total.oracle_mass += most.sum().item()
            total.ratio += (mass / most).sum().item()
            total.l2 += ((out - exact).norm(dim=-1) / exact.norm(dim=-1)).mean(-1).sum().item()
            total.rows += mass.numel()
            total.needle_pages += int(looked_for.sum())
            total.needle_pages_chosen += int((looked_for & chosen).sum())


def chosen_pages(layer: Layer, policy: str, budget: int, seq_lens, scale, scored=None):
    """Scores for other budgets, and the pages chosen: bool [queries, kv_heads, pages]."""
    queries, q_heads, head_dim = layer.query.shape
    kv_heads, tokens, _ = layer.key.shape
    pages, config, run = -(-tokens // PAGE), SparseConfig(), DECODE_POLICIES[policy]
    plan = DecodePlan.empty(queries, seq_lens.device)
    table = PageTable.empty(queries, kv_heads, budget // PAGE, seq_lens.device)
    block_table = torch.arange(pages, dtype=torch.int32).expand(queries, pages)
    selection = Selection(PAGE, budget // PAGE, config.sink_pages(PAGE), config.window_tokens)
    reference.plan_decode(seq_lens.int(), plan, table, selection, 0, queries * pages, False)
    if scored is None:
        rows = PAGE + summary_slots(run.summary, PAGE, head_dim, 4)
        kv = torch.zeros(pages, kv_heads, rows, 2 * head_dim)
        key, value = layer.key.transpose(0, 1), layer.value.transpose(0, 1)
        reference.page_write(key, value, kv, torch.arange(tokens), PAGE, run.summary)
        scores = PageScores.empty(q_heads, queries * pages, queries, seq_lens.device)
        run.score(layer.query, kv, block_table, plan, Geometry.of(layer.query, kv, PAGE, scale), scores)
        scored = kv, scores
    kv, scores = scored
    reference.select_pages(scores, block_table, plan, kv, selection, table)
    chosen = torch.zeros(queries * kv_heads, pages, dtype=torch.bool)
    for row, length in enumerate(table.lengths.tolist()):
        chosen[row, HeadPageGrid.of(kv).split(table.head_pages[row, : -(-length // PAGE)].long())[0]] = True
    return scored, chosen.view(queries, kv_heads, pages)


def add(a: Sums, b: Sums) -> Sums:
    return Sums(**{name: getattr(a, name) + getattr(b, name) for name in vars(a)})


def row_of(environment, shape, kind, args, policy, budget, sums: Sums) -> dict:
    summary = DECODE_POLICIES[policy].summary
    recall = sums.needle_pages_chosen / sums.needle_pages if sums.needle_pages else None
    return environment | {
        "bench": "selectors", "shape": shape, "text": kind, "split": args.split, "context": args.context,
        "page_size": PAGE, "policy": policy, "budget": budget, "queries": sums.rows,
        "summary_bytes_d128": summary_bytes_read(summary, PAGE, 128, 2),
        "mass": round(sums.mass / sums.oracle_mass, 4), "ratio": round(sums.ratio / sums.rows, 4),
        "l2": round(sums.l2 / sums.rows, 4), "recall": recall if recall is None else round(recall, 4),
        "needle_pages": sums.needle_pages,
    }  # fmt: skip


if __name__ == "__main__":
    main()
