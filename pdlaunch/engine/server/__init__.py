"""Serves one engine over HTTP, without importing torch."""
