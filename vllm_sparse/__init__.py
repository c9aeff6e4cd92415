"""vllm-sparse: page-sparse attention inside stock vLLM.

A sparse attention method is a choice of pages. Policies choose pages, engines attend over chosen
pages, and a PageTable is all that passes between them.

- ``config``      SparseConfig, the one configuration object
- ``policies``    decode policies: score(query head, page), higher = attend
- ``engines``     attention over a PageTable: triton, fa3, xformers, torch
- ``kernels``     Triton kernels and their plain-torch references
- ``page_table``  PageTable and the single-head view of a paged KV cache
- ``decode_plan`` which rows of a step are sparse, decided on the device
- ``tune``        finds a prefill pattern for each head of a model
- ``cache``       the KV-cache spec: pages with summaries
- ``backend``     vLLM's four backend classes, and ``compat``, the only file with version branches
- ``metrics``     what ran sparse, what ran dense and why, how much was attended
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout, kernels/ and plugin_entrypoints/ lie beside this package, not inside it.
_checkout = Path(__file__).parent.parent
if (_checkout / "kernels" / "__init__.py").is_file():
    __path__.append(str(_checkout))
