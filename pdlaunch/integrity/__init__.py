"""Checksums of KV blocks, computed on the CPU or on a CUDA device."""
