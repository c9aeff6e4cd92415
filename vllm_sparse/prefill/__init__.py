"""Sparse prefill of chunks: blocks of queries that choose pages."""
