"""vllm-sparse: page-sparse attention inside stock vLLM.

A sparse attention method is a choice of pages. Policies choose pages, attention kernels attend over chosen pages,
and a PageTable is all that passes between them.

- ``config``, ``support``, ``metrics``  what a user can choose, which layers run sparse and why, and what ran
- ``pages``      the layout of a page, summaries, page tables, scores and plans
- ``policies``   decode policies score pages, prefill policies mark pages to keep; one method family a file
- ``decode``     SparseDecode, budgets of KV heads, the recall monitor
- ``prefill``    SparsePrefill, its buffers, patterns of query heads
- ``attention``  attention kernels over a PageTable: triton, fa3, xformers, torch
- ``offload``    K and V in host memory, a hot set on the GPU
- ``backend``    vLLM's four backend classes and the KV-cache spec; ``compat`` has every version branch
- ``tools``      the commands plan, tune and eval, and the demo
- ``kernels``    Triton kernels and their plain-torch references
"""

from pathlib import Path

__version__ = "0.2.0"
ENV_CONFIG = "VLLM_SPARSE_CONFIG"
"""The variable that :mod:`vllm_sparse.config` reads; its name is here for who must not load that."""

# In a checkout, kernels/ and plugin_entrypoints/ lie beside this package, not inside it.
_checkout = Path(__file__).parent.parent
if (_checkout / "kernels" / "__init__.py").is_file():
    __path__.append(str(_checkout))
