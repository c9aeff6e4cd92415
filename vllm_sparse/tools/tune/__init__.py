"""`vllm-sparse tune`: the cheapest prefill pattern of each query head that keeps its output; with `--decode` the
budget of each KV head.

Jiang et al., "MInference 1.0", arXiv 2407.02490, section 3.2: patterns are sought once per model, offline,
by the output that they give on a sample. Here the sample runs through the real engine:

- ``command``  arguments, engine, passages, and the partial result that a later run continues
- ``worker``   what runs in vLLM's workers, beside the model
- ``measure``  one chunk under every candidate, against its dense output
- ``search``   candidates, sums, and the choice for each head
- ``budgets``  for decode: what pages hold in each KV head, and the budgets
"""
