"""HTTP of one engine; no torch."""
