"""`pdlaunch bench step`: the engine's step beside bare transformers."""
