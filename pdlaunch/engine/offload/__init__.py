"""Holds the host tier of the KV cache: multi-group block transfers between device and host, and
what is kept there.
"""
