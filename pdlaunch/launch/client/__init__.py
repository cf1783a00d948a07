"""Talks to a running deployment."""
