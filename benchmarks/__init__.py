"""Benchmarks of single parts, outside the wheel: ``python -m benchmarks.step`` and others."""
