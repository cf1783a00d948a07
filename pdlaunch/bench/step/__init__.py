"""`pdlaunch bench step` times the engine's step beside bare transformers."""
