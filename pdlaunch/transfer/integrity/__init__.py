"""Computes checksums of KV blocks, on the CPU or on a CUDA device."""
