"""Pulls blocks from prefill ranks, and proves them."""
