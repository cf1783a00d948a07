"""Timing of copies."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from pdlaunch.offload.copies import PageCopies

TRIAL_BYTES = 256 * 1024**2
TRIAL_PAGES = 16384
_SEED = 6


def scattered_copies(page_bytes: int, host: torch.Tensor, device: torch.device, num_bytes: int = TRIAL_BYTES) -> PageCopies:
    """Pages in random order on both sides, as many as fit into ``num_bytes`` and host memory; fresh device memory."""
    num_pages = max(1, min(num_bytes // page_bytes, host.numel() // page_bytes, TRIAL_PAGES))
    random = np.random.default_rng(_SEED)
    pages = torch.randint(0, 256, (num_pages, page_bytes), dtype=torch.uint8, device=device)
    return PageCopies(pages, random.permutation(num_pages), host, random.permutation(num_pages) * page_bytes)


def cuda_seconds(enqueue: Callable[[], object], *, repeats: int = 5) -> float:
    """Median time from begin to end of what ``enqueue`` puts on the current stream, submitting included; warmed up once."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    times: list[float] = []
    with torch.cuda.stream(stream):
        for _ in range(repeats + 1):
            stream.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record(stream)
            enqueue()
            end.record(stream)
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1000)
    return sorted(times[1:])[repeats // 2]


def host_seconds(copy: Callable[[], object], *, repeats: int = 3) -> float:
    """Median time of a copy that blocks; warmed up once."""
    times = []
    for _ in range(repeats + 1):
        begin_s = time.perf_counter()
        copy()
        times.append(time.perf_counter() - begin_s)
    return sorted(times[1:])[repeats // 2]
