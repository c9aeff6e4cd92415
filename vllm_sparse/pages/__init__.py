"""Pages of a KV cache as kernels and everything above them see them: their layout, and the tables of a step."""
