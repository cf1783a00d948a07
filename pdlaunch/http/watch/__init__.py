"""Asks engines over HTTP, and proves pairs of them by canaries."""
