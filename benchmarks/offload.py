"""Times copies of scattered KV blocks between device and host memory through the host tier's
queues, and one copy of all bytes: ``python -m benchmarks.offload``. Prints a line of JSON for each
block size: GB/s (10**9 bytes per second) of loads, of stores, and of both at the same time.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from pdlaunch.config.sizes import parse_size
from pdlaunch.engine.offload.planner import DIRECTIONS, Direction, JobFinished, OffloadJob
from pdlaunch.engine.offload.worker import CopyQueue, HostMemory, copy_by_engines, copy_by_thread

JOB_BYTES = 64 * 1024**2
WAYS: dict[str, tuple[Direction, ...]] = {
    "h2d": ("load",),
    "d2h": ("store",),
    "both": ("load", "store"),
}


class Traffic:
    """Jobs that store one half of the blocks and load the other half, in random order."""

    def __init__(self, pages: torch.Tensor, host: HostMemory) -> None:
        self._finished: queue.SimpleQueue[JobFinished] = queue.SimpleQueue()
        self._queues = {
            direction: CopyQueue(
                direction,
                pages,
                host,
                self._finished.put,
                copy_by_engines() if pages.is_cuda else copy_by_thread,
            )
            for direction in DIRECTIONS
        }
        half = len(pages) // 2
        num_jobs = min(max(1, half * pages.shape[1] // JOB_BYTES), half)
        random = np.random.default_rng(0)
        places = random.permutation(len(pages))
        self._jobs = {}
        for index, direction in enumerate(DIRECTIONS):
            blocks = index * half + random.permutation(half)
            own = places[index * half : (index + 1) * half]
            self._jobs[direction] = [
                OffloadJob(number, direction, some.tolist(), ids.tolist(), [])
                for number, (some, ids) in enumerate(
                    zip(
                        np.array_split(blocks, num_jobs), np.array_split(own, num_jobs), strict=True
                    )
                )
            ]

    def seconds(self, directions: Sequence[Direction]) -> float:
        """Return the time of one round of all jobs."""
        start_at = time.perf_counter()
        num_pending = 0
        for jobs in zip(*(self._jobs[direction] for direction in directions), strict=True):
            for direction, job in zip(directions, jobs, strict=True):
                self._queues[direction].submit(job)
                num_pending += 1
        for _ in range(num_pending):
            assert self._finished.get().ok
        return time.perf_counter() - start_at

    def close(self) -> None:
        for each in self._queues.values():
            each.close(60.0)


def measure(block_bytes: int, device: torch.device, num_bytes: int) -> dict[str, object]:
    """Return the row of a block size: the best of three rounds after a warm-up round."""
    num_blocks = num_bytes // block_bytes
    pages = torch.zeros(2 * num_blocks, block_bytes, dtype=torch.uint8, device=device)
    pin = device.type == "cuda"
    host = HostMemory(2 * num_blocks, block_bytes, pin=pin)
    traffic = Traffic(pages, host)
    row: dict[str, object] = {"block_bytes": block_bytes}
    for name, directions in WAYS.items():
        traffic.seconds(directions)
        seconds = min(traffic.seconds(directions) for _ in range(3))
        moved = len(directions) * num_blocks * block_bytes
        row[f"{name}_gb_per_s"] = round(moved / seconds / 1e9, 2)
    traffic.close()
    host.close()
    return row


def one_copy(device: torch.device, num_bytes: int) -> dict[str, object]:
    """Return the row of a single contiguous copy in each direction."""
    there = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    here = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def gb_per_s(target: torch.Tensor, source: torch.Tensor) -> float:
        times = []
        for _ in range(4):
            start_at = time.perf_counter()
            target.copy_(source)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start_at)
        return round(num_bytes / min(times) / 1e9, 2)

    rates = {"h2d_gb_per_s": gb_per_s(there, here), "d2h_gb_per_s": gb_per_s(here, there)}
    return {"block_bytes": "one copy", **rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block-sizes", default="32KiB,64KiB,256KiB,1MiB,2MiB")
    parser.add_argument("--memory", type=parse_size, help="bytes copied (1GiB; 32MiB on a CPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    options = parser.parse_args()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    num_bytes = options.memory or (2**30 if device.type == "cuda" else 2**25)
    # The host tier has one thread for each direction, so the single copy also gets one.
    torch.set_num_threads(1)
    rows = [one_copy(device, num_bytes)]
    sizes = [parse_size(size) for size in options.block_sizes.split(",")]
    rows += [measure(size, device, num_bytes) for size in sizes]
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
