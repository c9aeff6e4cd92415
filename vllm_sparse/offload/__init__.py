"""KV pages in CPU memory: a pinned host pool, and a hot set of head pages on the GPU."""
