"""Measures how fast a CUDA device computes checksums of KV blocks: ``python -m
benchmarks.checksums``.

The blocks are scattered ones of an 8B model (32 layers, 8 KV heads of 128, 16 bits). Prints one
line of JSON a case: the time from ``start`` to the result on the host, and its speed, beside that
of a plain read of the same memory. The checksums are compared with those of the xxHash library
first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.transfer.integrity.checksum import KVHasher

CACHE_BYTES = 8 * 1024**3
NUM_RUNS = 20


def main() -> None:
    """Measure all cases.

    ``--tokens``: lengths of the prompts whose blocks are hashed.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tokens", default="1024,4096,32768")
    parser.add_argument("--block-sizes", default="16,64")
    options = parser.parse_args()
    for block_size in _numbers(options.block_sizes):
        layout = KVCacheLayout(
            make_groups([None] * 32),
            num_kv_heads=8,
            head_dim=128,
            block_size=block_size,
            dtype_bytes=2,
        )
        shape = (CACHE_BYTES // layout.block_bytes, *layout.block_shape())
        kv_cache = torch.randn(shape, dtype=torch.bfloat16, device=options.device)
        hasher = KVHasher(kv_cache, layout)
        torch.cuda.synchronize(kv_cache.device)
        _check(hasher, kv_cache, layout)
        order = torch.randperm(len(kv_cache)).tolist()
        for num_tokens in _numbers(options.tokens):
            for heads in (slice(None), slice(0, 1)):
                case = _measure(hasher, kv_cache, order[: num_tokens // block_size], heads)
                sys.stdout.write(
                    json.dumps({"tokens": num_tokens, "block_size": block_size} | case) + "\n"
                )
                sys.stdout.flush()


def _check(hasher: KVHasher, kv_cache: torch.Tensor, layout: KVCacheLayout) -> None:
    last = len(kv_cache) - 1
    expected = KVHasher(kv_cache[last:].cpu(), layout).checksums([0], slice(None))
    if hasher.checksums([last], slice(None)) != expected:
        raise SystemExit("the kernel's checksums are not those of the xxHash library")


def _measure(
    hasher: KVHasher, kv_cache: torch.Tensor, block_ids: list[int], heads: slice
) -> dict[str, float]:
    num_bytes = kv_cache[0, heads].numel() * kv_cache.element_size() * len(block_ids)
    words = kv_cache.view(-1).view(torch.int64)[: num_bytes // 8]
    hash_s = _median_s(lambda: hasher.checksums(block_ids, heads))
    read_s = _median_s(lambda: int(words.max()))
    return {
        "heads": len(range(kv_cache.shape[1])[heads]),
        "mib": num_bytes / 2**20,
        "ms": round(hash_s * 1e3, 3),
        "gb_per_s": round(num_bytes / hash_s / 1e9),
        "plain_read_gb_per_s": round(num_bytes / read_s / 1e9),
    }


def _median_s(act: Callable[[], object]) -> float:
    times_s = []
    for _ in range(NUM_RUNS):
        start_at = time.perf_counter()
        act()
        times_s.append(time.perf_counter() - start_at)
    return statistics.median(times_s)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
