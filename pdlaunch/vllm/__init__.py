"""Holds a KV connector for vLLM that lets no block be used before it is proven.

It runs in vLLM's processes, with vLLM's packages: what it imports is there (numpy, torch, blake3).
``connector`` alone needs vLLM.
"""
