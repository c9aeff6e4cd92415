"""Time one layer's prefill attention, sparse beside dense FlashAttention-3.

    python -m benchmarks.prefill 1q32ks32k 1q128ks128k --chunk 8192 \\
        --sparse '{"prefill_policy": "vertical_slash", "vertical_tokens": 1024, "slash_tokens": 1024}'

A spec ``1q32ks128k`` prefills the last 32K of 128K tokens, in chunks. Data is random, so the density
follows from the sizes that ``--sparse`` gives, and the row says what it was. Checks results first, prints
milliseconds of estimate, choice, table building and attention, and appends JSON lines.

Policies that rank pages for each block keep as many of the random ones as they are told, which takes as long as a
share of the attention that was measured to need so many:

    python -m benchmarks.prefill 1q32ks32k 1q128ks128k 1q32ks512k --kernels fa3 --density 0.15 \\
        --sparse '{"prefill_policy": "sampled_queries"}'

Short chunks of long contexts are what FlashAttention-3 splits; how much that gains, ``--parts-mib`` tells:

    python -m benchmarks.prefill 1q256s64k 1q512s64k 1q4ks64k --kernels fa3 --parts-mib 0    # not at all
    python -m benchmarks.prefill 1q256s64k 1q512s64k 1q4ks64k --kernels fa3 --parts-mib 65536    # as it likes
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.batch_spec import parse
from benchmarks.kernels import CACHES, NAMES
from vllm_sparse.attention import fa3_attn
from vllm_sparse.attention.registry import kernel_class
from vllm_sparse.config import SparseConfig
from vllm_sparse.kernels import reference
from vllm_sparse.pages.geometry import Geometry
from vllm_sparse.pages.head_patterns import HeadPatterns
from vllm_sparse.pages.query_blocks import QueryBlocks
from vllm_sparse.prefill.attend import SparsePrefill
from vllm_sparse.prefill.buffers import PrefillBuffers

DEFAULT = {
    "prefill_policy": "vertical_slash",
    "prefill_top_p": 0,
    "vertical_tokens": 1024,
    "slash_tokens": 1024,
}


class Timed:
    """Passes one method through and keeps CUDA events around each call of it."""

    def __init__(self, target, method: str):
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        run = getattr(target, method)

        def timed(*args):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(*args)
            end.record()
            self.spans.append((start, end))

        setattr(target, method, timed)

    def take_ms(self) -> float:
        """Milliseconds since it was last asked; the device must be idle."""
        total = sum(start.elapsed_time(end) for start, end in self.spans)
        self.spans.clear()
        return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=["1q8ks8k", "1q32ks32k", "1q128ks128k"])
    parser.add_argument("--chunk", type=int, default=8192, help="query tokens of a step")
    parser.add_argument("--sparse", default="{}", help="sparse settings as JSON, over vertical_slash")
    parser.add_argument("--density", type=float, help="share of causal pairs to keep, of policies that rank pages")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--kernels", nargs="*", default=["fa3", "triton"])
    parser.add_argument(
        "--parts-mib", type=int, default=fa3_attn.PARTS_BYTES >> 20, help="memory for parts of split rows"
    )
    parser.add_argument("--kv-cache-dtype", choices=CACHES, default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    fa3_attn.PARTS_BYTES = args.parts_mib << 20
    print(f"{'batch':>14} {'kernel':>8} {'density':>8} {'estimate':>9} {'choose':>8} {'table':>8} {'attend':>9} "
          f"{'all':>9} {'dense FA3':>10} {'ratio':>6}")  # fmt: skip
    rows = []
    for spec in args.specs:
        for row in bench(spec, args):
            print(
                f"{spec:>14} {row['kernel']:>8} {row['density']:8.3f} {row['estimate_ms']:9.3f} "
                f"{row['choose_ms']:8.3f} {row['table_ms']:8.3f} {row['attend_ms']:9.3f} {row['sparse_ms']:9.3f} "
                f"{row['baseline_ms']:10.3f} {row['speedup']:5.2f}x",
                flush=True,
            )
            rows.append(row)
    results.append("prefill", rows, args.out)


def bench(spec: str, args) -> list[dict]:
    request = parse(spec)[0]
    context, page, heads, dim = request.context_tokens, args.page_size, args.kv_heads, args.head_dim
    settings = {**DEFAULT, **json.loads(args.sparse)}
    if args.density:
        settings |= {"slash_tokens": 0, "vertical_tokens": kept_tokens(request, args.density)}
    config = SparseConfig.from_mapping(settings, "--sparse")
    q_heads, scale, device = heads * args.group, dim**-0.5, torch.device("cuda")
    pages, kv_dtype = -(-context // page), CACHES[args.kv_cache_dtype]
    kv = torch.empty(pages, heads, page + 1, 2 * dim, dtype=torch.bfloat16, device=device).normal_().to(kv_dtype)
    table = torch.randperm(pages, device=device).int()[None]
    chunks = []
    for start in range(context - request.query_tokens, context, args.chunk):
        chunks.append(QueryBlocks(0, 0, min(args.chunk, context - start), start))
    q = torch.randn(args.chunk, q_heads, dim, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(q)
    buffers = PrefillBuffers.allocate(q_heads, dim, page, context, args.chunk, q.dtype, device)
    dense_q = q.to(kv_dtype)  # FlashAttention wants queries in the dtype of the cache
    dense_ms = median_ms(lambda: run_dense(dense_q, kv, table, chunks, page, scale, out), args.repeats)
    found = []
    for name in args.kernels:
        sparse = SparsePrefill(
            config.new_prefill_policy(page, HeadPatterns.of([config.uniform_pattern] * q_heads, page, device)),
            kernel_class(name)(), buffers, config.selection(page), Geometry(q_heads, heads, dim, page, scale),
        )  # fmt: skip
        check(sparse, q, kv, table, chunks[-1], out, name)

        def run(sparse=sparse):
            for chunk in chunks:
                sparse.attend(q, kv, table, chunk, out)

        sparse_ms = median_ms(run, args.repeats)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        estimate = Timed(sparse.policy, "estimate")
        choose = Timed(sparse.policy, "choose")
        attend = Timed(sparse.attention, "attend_blocks")
        buffers.counters.zero_()
        whole_ms = median_ms(run, 1)
        attended, causal = buffers.counters.tolist()
        estimate_ms, choose_ms, attend_ms = (part.take_ms() / 2 for part in (estimate, choose, attend))
        found.append(
            results.environment()
            | {
                "bench": "prefill_attention", "shape": f"kv{heads}_group{args.group}_d{dim}_page{page}",
                "batch_spec": spec, "batch": 1, "context": context, "chunk": args.chunk, "kernel": name,
                "policy": config.prefill_policy, "sparse": settings, "mode": "resident", "tp": 1,
                "kv_dtype": NAMES[kv_dtype], "baseline_kv_dtype": NAMES[kv_dtype],
                "density": round(attended / causal, 4), "estimate_ms": round(estimate_ms, 4),
                "choose_ms": round(choose_ms, 4), "attend_ms": round(attend_ms, 4),
                "table_ms": round(whole_ms - estimate_ms - choose_ms - attend_ms, 4),
                "sparse_ms": round(sparse_ms, 4), "baseline_ms": round(dense_ms, 4),
                "speedup": round(dense_ms / sparse_ms, 3),
                "overhead": round((whole_ms - attend_ms) / attend_ms, 4),
                "parts_mib": args.parts_mib,
                "buffers_mib": round(buffers.num_bytes / 2**20, 1),
                "temporary_mib": round((torch.cuda.max_memory_allocated() - held) / 2**20, 1),
            }
        )  # fmt: skip
    return found


def kept_tokens(request, density: float) -> int:
    """Tokens that every query must keep to attend to ``density`` of the pairs of a request's queries."""
    end, first = request.context_tokens, request.context_tokens - request.query_tokens
    pairs = density * (end * end - first * first) / 2
    # Queries up to this position keep all before them.
    for tokens in range(128, end, 128):
        whole = max(0, tokens - first)
        if whole * (first + min(tokens, end)) / 2 + (end - first - whole) * tokens >= pairs:
            return tokens
    return end


def median_ms(run, repeats: int) -> float:
    """Median of ``repeats`` runs after a warm-up, launch gaps included: prefill is in no CUDA graph."""
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def run_dense(q, kv, table, chunks, page, scale, out) -> None:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    k, v = kv[:, :, :page].transpose(1, 2).split(q.shape[-1], -1)
    for chunk in chunks:
        n = chunk.num_tokens
        flash_attn_varlen_func(
            q=q[:n], k=k, v=v, out=out[:n], max_seqlen_q=n, max_seqlen_k=chunk.end_position,
            cu_seqlens_q=torch.tensor([0, n], dtype=torch.int32, device=q.device),
            seqused_k=torch.tensor([chunk.end_position], dtype=torch.int32, device=q.device),
            block_table=table, softmax_scale=scale, causal=True, fa_version=3,
        )  # fmt: skip


def check(sparse: SparsePrefill, q, kv, table, chunk: QueryBlocks, out, name: str) -> None:
    """Before anything is timed, the attention kernel must agree with the reference on the same page table."""
    last = QueryBlocks(0, 0, min(333, chunk.num_tokens), chunk.end_position - min(333, chunk.num_tokens))
    out.fill_(float("nan"))
    sparse.attend(q, kv, table, last, out)
    expected = torch.empty_like(q[: last.num_tokens], dtype=torch.float32)
    buffers = sparse.buffers
    reference.sparse_prefill(
        q[: last.num_tokens], kv, buffers.table(last), sparse.geometry, expected
    )  # fmt: skip
    error = ((out[: last.num_tokens].float() - expected).norm() / expected.norm()).item()
    if not error < (0.1 if name == "fa3" and kv.dtype is not q.dtype else 1e-2):
        raise SystemExit(f"{name}: relative error {error:.1e} against the torch reference")


if __name__ == "__main__":
    main()
