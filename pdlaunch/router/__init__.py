"""Routes requests to prefill and decode engines; no torch."""
