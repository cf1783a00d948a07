"""Holds device memory by tag in CuMem pools, which can be put to sleep, woken up at the same
addresses, and shared with peers.
"""
