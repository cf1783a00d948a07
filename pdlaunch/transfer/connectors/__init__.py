"""Connectors move the bytes of KV blocks between ranks: NIXL, mapped memory, Mooncake, files."""
