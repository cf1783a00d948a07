"""Holds the host tier of the KV cache: block transfers to and from the host, and what is there."""
