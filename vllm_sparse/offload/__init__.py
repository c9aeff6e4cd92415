"""KV pages in CPU memory: a pinned host pool, and a hot set of units on the GPU."""
