"""Benchmarks: ``python -m benchmarks.NAME``; each appends what it measured to ``benchmarks/results``."""
