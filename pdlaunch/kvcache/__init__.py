"""Block pool, KV cache groups, block tables, prefix cache; no torch."""
