"""Transfers KV blocks between engines: connectors, side channel, prefill side and decode side."""
