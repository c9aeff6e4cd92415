"""What `vllm-sparse check` says to set."""

from __future__ import annotations

from typing import Any

from vllm_sparse.backend import compat
from vllm_sparse.config import SparseConfig
from vllm_sparse.pages.layout import PAGE_SIZES
from vllm_sparse.support import QUANTISED_CACHES, Treatment
from vllm_sparse.tools.dry_engine import DryEngine


def advice(engine: DryEngine, config: SparseConfig, cache: dict[str, Any]) -> list[str]:
    """Options worth a change, each with its reason; ``cache``: as in the report."""
    decisions, vllm_config = list(engine.decisions.values()), engine.vllm_config
    longest = vllm_config.model_config.max_model_len
    if not engine.is_sparse:
        first = [decision for decision in decisions if decision.reason.startswith("dense_layers=")]
        if first:
            return [f"sparse.dense_layers below {len(first)}: this model has no more full-attention layers"]
        return ["no --attention-backend: nothing of this model would run sparse"]
    found = []
    reasons = {decision.reason for decision in decisions if decision.treatment is Treatment.STOCK}
    if any("--language-model-only" in reason for reason in reasons):
        found.append("--language-model-only, if no images are sent: then more layers run sparse")
    if "sliding window" in reasons:
        found.append("nothing for layers with sliding windows: they read no more than their window in stock, too")
    if cache.get("fits") is False:
        found.append(f"--max-model-len {cache['sparse_tokens']} or less, or more GPUs: {longest} do not fit")
    whole = [key for key in ("min_context_tokens", "budget_tokens") if getattr(config, key) >= longest]
    if whole and config.decode_policy != "dense":
        most = max(config.min_context_tokens, config.budget_tokens)
        keys = " and ".join(f"sparse.{key}" for key in whole)
        found.append(f"{keys} below --max-model-len {longest}: contexts up to {most} are attended whole")
    block_size = vllm_config.cache_config.block_size
    # vLLM sizes blocks to states, and to caches of several dtypes, whatever is asked.
    sized = engine.linear_layers or vllm_config.cache_config.kv_cache_dtype_skip_layers
    if not sized and block_size != PAGE_SIZES[0]:
        found.append(f"--block-size {PAGE_SIZES[0]}: pages of {block_size} tokens are chosen more coarsely")
    if compat.kv_dtype(vllm_config) not in QUANTISED_CACHES:
        found.append("--kv-cache-dtype fp8, on GPUs that know it: twice the tokens, here as in stock")
    return found
