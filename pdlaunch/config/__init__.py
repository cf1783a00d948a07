"""Config models: the only knobs, where their values come from, and what is derived from them."""
