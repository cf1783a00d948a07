"""CuMem pools: device memory by tag that can be put to sleep, woken up at the same addresses, and
shared with peers.
"""
