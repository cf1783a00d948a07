"""Benchmarks of single parts (``python -m benchmarks.step`` and others). The wheel omits them."""
