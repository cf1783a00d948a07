"""Device memory by tag, in pools that can sleep, wake up at the same addresses, and be shared."""
