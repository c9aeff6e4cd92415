"""How much of its context a prefill chunk chooses, over all its query blocks and heads, on a real model's text.

    python -m benchmarks.offload_union
    python -m benchmarks.offload_union --split dev '{"prefill_policy": "xattention", "prefill_coverage": 0.8}'

With offload a chunk could leave unread what no block and no query head of a KV head's group chooses. Units (page,
KV head) of the pages before each chunk are counted, over all chunks and layers of the passages. Without arguments
every policy that estimates runs with its default coverage and with fixed sizes. Options and split as in
:mod:`benchmarks.prefill_quality`. On a CPU; appends a JSON line per setting.
"""

from __future__ import annotations

import os

from benchmarks import prefill_quality, results

ESTIMATING = ("vertical_slash", "block_sparse", "flex_prefill", "xattention")
FIXED_SIZES = {"prefill_coverage": 0, "vertical_tokens": 1024, "slash_tokens": 512}
NO_DENSE_LAYER = {"dense_layers": 0}
"""As offload has it."""


class Union:
    """Watches sparse chunks: units that their tables name, of those before the chunk."""

    def __init__(self) -> None:
        import torch
        from vllm_sparse.kernels import reference

        from vllm_sparse.page_table import UnitGrid
        from vllm_sparse.prefill import SparsePrefill

        attend, fill, self.counts = SparsePrefill.attend, reference.prefill_table, [0, 0]

        def prefill_table(keep, block_table, blocks, kv, page_size, *rest) -> None:
            fill(keep, block_table, blocks, kv, page_size, *rest)
            table = rest[-1]
            page = torch.arange(table.units.shape[1])
            units = table.units[page * page_size < table.lengths[:, None]].long()
            self.named[UnitGrid.of(kv).split(units)] = True

        def watched(sparse, q, kv, block_table, chunk, out) -> None:
            self.named = torch.zeros(kv.shape[:2], dtype=torch.bool)
            attend(sparse, q, kv, block_table, chunk, out)
            before = block_table[chunk.request, : chunk.first_position // sparse.buffers.page_size].long()
            self.counts[0] += int(self.named[before].sum())
            self.counts[1] += self.named[before].numel()

        SparsePrefill.attend, reference.prefill_table = watched, prefill_table


def main() -> None:
    args = prefill_quality.parse_args(__doc__)
    os.environ.update(prefill_quality.variables(gpu=False))
    from transformers import AutoTokenizer

    model = prefill_quality.prepared(args.model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts, environment = prefill_quality.passages(tokenizer, args), results.environment()
    engine, union = prefill_quality.Engine(model, args, NO_DENSE_LAYER), Union()
    grid = [{"prefill_policy": name, **sizes} for name in ESTIMATING for sizes in ({}, FIXED_SIZES)]
    for settings in args.settings or grid:
        settings, union.counts = prefill_quality.resolved({**NO_DENSE_LAYER, **settings}), [0, 0]
        found = engine.measure(settings, texts, [], tokenizer)
        row = environment | {
            "bench": "offload_union", "shape": model.name, "tp": 1, "batch": 1, "context": args.context,
            "chunk": args.chunk, "page_size": args.page_size, "split": args.split, "passages": len(texts),
            "dtype": engine.dtype, "kernel": engine.kernel, "policy": settings["prefill_policy"],
            "sparse": settings, "density": found.density, "perplexity": round(found.perplexity, 5),
            "units": union.counts[1], "units_chosen": union.counts[0],
            "union_share": round(union.counts[0] / union.counts[1], 4),
        }  # fmt: skip
        results.append("offload_union", [row], args.out)
        print({key: row[key] for key in ("policy", "density", "union_share", "sparse")}, flush=True)


if __name__ == "__main__":
    main()
