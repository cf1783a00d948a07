"""Measures deployments and transfers, and damages them on purpose."""
