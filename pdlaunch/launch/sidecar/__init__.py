"""Starts an engine that cannot speak for itself, watches it over HTTP, and speaks for it."""
