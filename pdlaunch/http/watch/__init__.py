"""Calls the HTTP API of engines, and proves pairs of engines with canaries."""
