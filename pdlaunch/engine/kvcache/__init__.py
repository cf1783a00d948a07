"""Holds the block pool, KV cache groups, block tables and the prefix cache; no torch."""
