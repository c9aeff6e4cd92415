"""Benchmarks: ``python -m benchmarks.kernels`` and ``python -m benchmarks.engine``."""
