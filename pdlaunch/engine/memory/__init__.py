"""Holds device memory by tag in pools that sleep, wake up at their addresses, and can be shared."""
