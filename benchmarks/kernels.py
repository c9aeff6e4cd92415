"""Time one layer's decode kernels beside dense FlashAttention-3.

    python -m benchmarks.kernels 1q1s128k 8q1s32k --budget 2048
    python -m benchmarks.kernels 1q1s128k --policies quest midbound sketch sketch2
    python -m benchmarks.kernels 1q1s128k 8q1s32k --kv-cache-dtype auto,fp8 --drafts 3 --kernels triton

Prints microseconds, the bytes that must be read and written, and achieved GB/s of each kernel, checks results
first, and appends JSON lines. Over a cache in fp8 the scales are 1, and the dense kernel's queries are in e4m3
before it is timed.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.batch_spec import parse
from vllm_sparse.attention.registry import kernel_class
from vllm_sparse.config import RESIDENT, SparseConfig
from vllm_sparse.kernels import launchers, reference
from vllm_sparse.pages.decode_plan import DecodePlan, segment_pages
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.page_scores import PageScores
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.query_tokens import ONE, QueryTokens
from vllm_sparse.pages.selection import Selection
from vllm_sparse.pages.summaries import summary_bytes_read, summary_slots
from vllm_sparse.policies import DECODE_POLICIES
from vllm_sparse.tools.measure import graph_us

SHORT_ROWS_DENSE_FROM = 16
"""As in vllm_sparse/backend/builder.py, which needs vLLM: such batches leave short rows to the dense backend."""
CACHES = {"auto": torch.bfloat16, "fp8": torch.float8_e4m3fn}
NAMES = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}
WORKING_SET_BYTES = 256 << 20
"""Rotate over layers until their data exceeds the L2 cache several times."""


@dataclass
class Layer:
    kv: torch.Tensor
    q: torch.Tensor
    dense_q: torch.Tensor
    """In the dtype of ``kv``, as FlashAttention wants it."""
    table: PageTable
    out: torch.Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=["1q1s8k", "1q1s32k", "1q1s128k", "8q1s32k", "3q1s128k"])
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument(
        "--min-context",
        type=int,
        default=RESIDENT["min_context_tokens"],
        help="up to this many tokens a request is dense",
    )
    parser.add_argument("--max-context", type=int, default=131328, help="longest context the engine would admit")
    parser.add_argument(
        "--policies", nargs="*", default=["quest"], choices=[name for name in DECODE_POLICIES if name != "dense"]
    )
    parser.add_argument("--kernels", nargs="*", default=["triton", "fa3"])
    parser.add_argument("--kv-cache-dtype", type=caches, default="auto", help="auto, fp8, or auto,fp8")
    parser.add_argument("--drafts", type=int, default=0, help="that each request verifies")
    parser.add_argument(
        "--tuning", type=json.loads, default={}, help='changes of TUNING, as {"sketch_score": {"waves": 6}}'
    )
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    args = parser.parse_args()
    for kernel, changes in args.tuning.items():
        importlib.import_module(f"vllm_sparse.kernels.{kernel}").TUNING.update(changes)
    torch.manual_seed(0)
    rows = []
    print(f"{'batch':>12} {'policy':>10} {'KV':>4} {'kernel':>14} {'us':>9} {'MB':>9} {'GB/s':>6}")
    for spec, policy, kv_dtype in itertools.product(args.specs, args.policies, args.kv_cache_dtype):
        for row in bench(spec, policy, kv_dtype, args):
            shown = f"{row['us']:9.1f} {row['bytes'] / 1e6:9.3f} {1e3 * row['tb_per_s']:6.0f}"
            print(f"{spec:>12} {policy:>10} {row['kv_dtype']:>4} {row['kernel']:>14} {shown}", flush=True)
            rows.append(row)
    results.append("kernels", rows, args.out)


def caches(text: str) -> list[torch.dtype]:
    """The dtypes of ``auto,fp8``."""
    for name in text.split(","):
        if name not in CACHES:
            raise argparse.ArgumentTypeError(f"{name!r}; allowed: {', '.join(CACHES)}")
    return [CACHES[name] for name in text.split(",")]


def bench(spec: str, policy_name: str, kv_dtype: torch.dtype, args) -> list[dict]:
    requests, policy = parse(spec), DECODE_POLICIES[policy_name]
    lens = [request.context_tokens for request in requests]
    page, heads, dim = args.page_size, args.kv_heads, args.head_dim
    q_heads, budget_pages, scale = heads * args.group, args.budget // page, args.head_dim**-0.5
    pages = [-(-n // page) for n in lens]
    token_bytes = 2 * dim * kv_dtype.itemsize
    page_slots = page + summary_slots(policy.summary, page, dim, kv_dtype.itemsize)
    layer_bytes = sum(pages) * heads * page_slots * token_bytes
    page_summary_bytes = summary_bytes_read(policy.summary, page, dim, kv_dtype.itemsize)
    summary_bytes = max(1, sum(pages) * heads * page_summary_bytes)
    count = max(2, min(16, -(-WORKING_SET_BYTES // summary_bytes), (40 << 30) // layer_bytes))
    device = torch.device("cuda")
    blocks = torch.randperm(sum(pages), device=device).int()
    width = max(*pages, -(-args.max_context // page))
    block_table = torch.zeros(len(lens), width, dtype=torch.int32, device=device)
    start = 0
    for request, n in enumerate(pages):
        block_table[request, :n] = blocks[start : start + n]
        start += n
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    tokens, queries = 1 + args.drafts, ONE
    if args.drafts:
        starts = torch.arange(len(lens) + 1, dtype=torch.int32, device=device) * tokens
        queries = QueryTokens(tokens, starts)
    plan = DecodePlan.empty(len(lens), device, segment_pages(width, budget_pages)).rows(len(lens), queries)
    table = PageTable.empty(len(lens), heads, max(budget_pages, args.min_context // page), device)
    table.queries = queries
    short_rows_dense = len(lens) >= SHORT_ROWS_DENSE_FROM
    top_p = SparseConfig.top_p if policy.adaptive else 0.0
    selection = Selection(page, budget_pages, 1, 32, top_p)
    launchers.plan_decode(
        seq_lens, plan, table, selection, args.min_context, sum(pages), short_rows_dense
    )  # fmt: skip
    scores = PageScores.empty(q_heads, sum(pages), len(lens), device)
    layers = []
    for _ in range(count):
        kv = torch.empty(sum(pages), heads, page_slots, 2 * dim, dtype=kv_dtype, device=device)
        fresh = torch.randn(2, sum(pages) * page, heads, dim, dtype=torch.bfloat16, device=device)
        launchers.page_write(*fresh, kv, torch.arange(sum(pages) * page, device=device), page, policy.summary)
        del fresh
        q = torch.randn(len(lens) * tokens, q_heads, dim, dtype=torch.bfloat16, device=device)
        layers.append(Layer(kv, q, q.to(kv_dtype), table, torch.empty_like(q)))

    def score(layer):
        policy.score(layer.q, layer.kv, block_table, plan, Geometry.of(layer.q, layer.kv, page, scale), scores)

    def select(layer):
        launchers.select_pages(scores, block_table, plan, layer.kv, selection, layer.table)

    attended = int(table.lengths.sum())
    scored = sum(n for n, length in zip(pages, lens, strict=True) if length > args.min_context)
    summary_bytes = scored * heads * page_summary_bytes
    attend_bytes = attended * token_bytes
    dense_bytes = sum(lens) * heads * token_bytes
    # K and V of a new token come in bfloat16; the older keys of its page are read for the summary.
    stock_write_bytes = len(lens) * tokens * heads * (4 * dim + token_bytes)
    older = len(lens) * max(page - tokens, 0) if policy.summary != "none" else 0
    write_bytes = stock_write_bytes + heads * (older * token_bytes // 2 + len(lens) * page_summary_bytes)
    timed = [
        ("score", score, summary_bytes),
        ("select", select, q_heads * scored * 4),
    ]
    for name in args.kernels:
        timed.append((f"attend_{name}", _attend(kernel_class(name)(), page, scale), attend_bytes))
    new_tokens = (tokens, heads, dim, page, block_table)
    # Fifteen steps of sixteen complete no page.
    between = seq_lens - page // 2
    timed.append(("page_write", _page_write(policy.summary, *new_tokens, between), stock_write_bytes))
    timed.append(("page_complete", _page_write(policy.summary, *new_tokens, seq_lens // page * page), write_bytes))
    timed.append(("stock_write", _stock_write(*new_tokens, between), stock_write_bytes))
    timed.append(("dense_fa3", _dense(block_table, seq_lens, tokens, max(lens), page, scale), dense_bytes))
    for layer in layers:
        score(layer)
        select(layer)
    _check(layers[0], timed, page, scale)
    times = {name: graph_us([lambda f=run, x=layer: f(x) for layer in layers]) for name, run, _ in timed}

    def step(layer):
        score(layer)
        select(layer)
        timed[2][1](layer)

    times["sparse_step"] = graph_us([lambda x=layer: step(x) for layer in layers])
    sizes = {name: size for name, _, size in timed} | {"sparse_step": summary_bytes + attend_bytes}
    common = results.environment() | {
        "bench": "attention", "shape": f"kv{heads}_group{args.group}_d{dim}_page{page}", "batch_spec": spec,
        "batch": len(lens), "context": max(lens), "budget": args.budget, "policy": policy_name, "mode": "resident",
        "tp": 1, "tuning": args.tuning, "drafts": args.drafts,
        "kv_dtype": NAMES[kv_dtype], "baseline_kv_dtype": NAMES[kv_dtype],
        "baseline_ms": times["dense_fa3"] / 1e3,
    }  # fmt: skip
    return [
        common
        | {
            "kernel": name,
            "us": round(us, 2),
            "bytes": sizes[name],
            "tb_per_s": round(sizes[name] / us / 1e6, 3),
            "sparse_ms": round(us / 1e3, 5),
            "speedup": round(times["dense_fa3"] / us, 3),
        }
        for name, us in times.items()
    ]


def _attend(kernel, page, scale):
    return lambda layer: kernel.attend_rows(
        layer.q, layer.kv, layer.table, Geometry.of(layer.q, layer.kv, page, scale), layer.out
    )


def _dense(block_table, seq_lens, tokens, longest, page, scale):
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32, device="cuda") * tokens

    def run(layer):
        k, v = layer.kv[:, :, :page].transpose(1, 2).split(layer.q.shape[-1], -1)
        flash_attn_varlen_func(
            q=layer.dense_q, k=k, v=v, out=layer.out, cu_seqlens_q=starts, max_seqlen_q=tokens, seqused_k=seq_lens,
            max_seqlen_k=longest, block_table=block_table, softmax_scale=scale, causal=True, fa_version=3,
        )  # fmt: skip

    return run


def _new_tokens(tokens, heads, dim, page, block_table, seq_lens):
    """The last ``tokens`` tokens of each request, and their slots."""
    last = seq_lens[:, None].long() - torch.arange(tokens, 0, -1, device="cuda")
    slots = (block_table.gather(1, last // page).long() * page + last % page).flatten()
    return torch.randn(len(slots), heads, dim, dtype=torch.bfloat16, device="cuda"), slots


def _page_write(summary, tokens, heads, dim, page, block_table, seq_lens):
    key, slots = _new_tokens(tokens, heads, dim, page, block_table, seq_lens)
    return lambda layer: launchers.page_write(key, key, layer.kv, slots, page, summary)


def _stock_write(tokens, heads, dim, page, block_table, seq_lens):
    """What FLASH_ATTN runs in its place."""
    from vllm._custom_ops import reshape_and_cache_flash

    key, slots = _new_tokens(tokens, heads, dim, page, block_table, seq_lens)
    one = torch.ones((), device="cuda")

    def run(layer):
        coded = layer.kv.dtype is torch.float8_e4m3fn
        kv = layer.kv.view(torch.uint8) if coded else layer.kv  # codes are bytes to vLLM
        k, v = kv[:, :, :page].transpose(1, 2).split(dim, -1)
        reshape_and_cache_flash(key, key, k, v, slots, "fp8" if coded else "auto", one, one)

    return run


def _check(layer, timed, page, scale) -> None:
    """Attention kernels must agree with the reference before anything is timed."""
    expected = torch.empty_like(layer.q, dtype=torch.float32)
    reference.sparse_decode(
        layer.q.float(), layer.kv, layer.table, Geometry.of(layer.q.float(), layer.kv, page, scale), expected
    )
    for name, run, _ in timed:
        if name.startswith("attend"):
            layer.out.fill_(float("nan"))
            run(layer)
            in_table = layer.table.lengths.view(-1, layer.kv.shape[1])[:, 0] > 0
            rows = in_table.repeat_interleave(len(layer.q) // len(in_table))
            mine, right = layer.out[rows].float(), expected[rows]
            error = ((mine - right).norm() / right.norm().clamp(min=1e-9)).item()
            # FlashAttention-3 multiplies codes of queries and of weights, too.
            if not error < (0.1 if name == "attend_fa3" and layer.kv.dtype is not layer.q.dtype else 1e-2):
                raise SystemExit(f"{name}: relative error {error:.1e} against the torch reference")


if __name__ == "__main__":
    main()
