"""Measures how much memory a rank gives back when it sleeps, and how fast: ``python -m
benchmarks.sleep --model DIR``.

Bytes are counted by the driver (``cuMemGetInfo``), against those of weights and KV cache. Prints
one line of JSON a cycle.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.sizes import parse_size
from pdlaunch.engine.memory.pools import KV_CACHE, WEIGHTS
from pdlaunch.engine.runner import ModelRunner


def main() -> None:
    """Run the cycles.

    ``--model``: a directory with config.json, and weights unless ``--dummy``.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dummy", action="store_true", help="made-up weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-cache-memory", type=parse_size, default="64GiB")
    parser.add_argument("--levels", default="1,2", help="of the cycles, one after the other")
    options = parser.parse_args()
    spec = _spec(options.model, options.dtype, options.kv_cache_memory, dummy=options.dummy)
    runner = ModelRunner(spec, tp=None, progress=lambda *_: None)
    runner.warm_up()
    for level in options.levels.split(","):
        sys.stdout.write(json.dumps(_cycle(runner, int(level))) + "\n")
        sys.stdout.flush()


def _cycle(runner: ModelRunner, level: int) -> dict[str, float]:
    """Sleep and wake up once."""
    before = _free_bytes()
    sleep_s = _seconds(lambda: runner.sleep(level))
    asleep = _free_bytes()
    wake_weights_s = _seconds(lambda: runner.wake_up([WEIGHTS]))
    wake_kv_cache_s = _seconds(lambda: runner.wake_up([KV_CACHE]))
    return {
        "level": level,
        "given_back_gib": round((asleep - before) / 2**30, 3),
        "weights_and_kv_gib": round(_nominal_bytes(runner) / 2**30, 3),
        "sleep_s": round(sleep_s, 3),
        "wake_weights_s": round(wake_weights_s, 3),
        "wake_kv_cache_s": round(wake_kv_cache_s, 3),
        "leaked_mib": round((before - _free_bytes()) / 2**20, 1),
    }


def _nominal_bytes(runner: ModelRunner) -> int:
    return runner.weight_bytes + runner.kv_cache.numel() * runner.kv_cache.element_size()


def _free_bytes() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _seconds(act: Callable[[], object]) -> float:
    start_at = time.perf_counter()
    act()
    torch.cuda.synchronize()
    return time.perf_counter() - start_at


def _spec(model_dir: Path, dtype: str, kv_cache_bytes: int, *, dummy: bool) -> EngineSpec:
    return EngineSpec.model_validate(
        {
            "name": "bench-0",
            "role": "decode",
            "model_dir": str(model_dir),
            "served_model_name": "bench",
            "load_format": "dummy" if dummy else "auto",
            "dtype": dtype,
            "max_model_len": 2048,
            "block_size": 64,
            "kv_cache_memory": kv_cache_bytes,
            "enable_cumem_allocator": True,
            "enable_sleep_mode": True,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 2048,
            "device": "cuda",
            "device_indices": (0,),
            "tensor_parallel_size": 1,
            "num_threads": 1,
        }
    )


if __name__ == "__main__":
    main()
