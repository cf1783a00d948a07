"""The block pool, KV cache groups, block tables and the prefix cache; without torch."""
