"""Models: loading from transformers, paged attention, tensor parallelism."""
