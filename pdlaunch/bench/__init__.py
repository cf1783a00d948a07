"""Measures deployments and transfers of KV blocks."""
