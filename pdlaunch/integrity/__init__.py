"""Checksums of KV blocks, on the CPU and on a CUDA device."""
