"""Serves one engine over HTTP; no torch."""
