"""Implements the rules of check-config: pure functions over a resolved launch and probed facts."""
