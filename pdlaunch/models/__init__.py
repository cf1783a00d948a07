"""Loading a transformers model, paged attention, tensor parallelism."""
