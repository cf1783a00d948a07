"""Which copy methods are chosen from what was measured."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from pdlaunch.offload.batch_copy import BatchCopy
from pdlaunch.offload.copies import PageCopies, merge_runs
from pdlaunch.offload.copy_methods import CopyMethod, HostCopy, TorchCopy
from pdlaunch.offload.host_memory import HostMemory
from pdlaunch.offload.method_choice import MethodTable, measure_pairs, pick_pair
from pdlaunch.offload.spec import Direction
from pdlaunch.platform.cuda_driver import DriverError


class Named(CopyMethod):
    def __init__(self, name: str, *, able: bool = True) -> None:
        self.name = name
        self._able = able

    def supports(self, copies: PageCopies) -> bool:
        return self._able

    def copy(self, copies: PageCopies, direction: Direction) -> None:
        raise AssertionError


ENGINE, KERNEL = Named("engine"), Named("kernel")


def choose(alone: dict[str, float], both: dict[tuple[str, str], float]) -> tuple[str, str]:
    pairs = measure_pairs(
        {"load": [ENGINE, KERNEL], "store": [ENGINE, KERNEL]},
        lambda method, _direction: alone[method.name],
        lambda load, store: both[load.name, store.name],
    )
    pair = pick_pair(pairs)
    return pair.load.name, pair.store.name


def test_prefers_the_copy_engine_when_it_is_nearly_as_fast() -> None:
    both = dict.fromkeys([("engine", "engine"), ("engine", "kernel"), ("kernel", "engine"), ("kernel", "kernel")], 90.0)
    assert choose({"engine": 49.0, "kernel": 50.0}, both) == ("engine", "engine")


def test_a_pair_that_starves_one_direction_loses() -> None:
    both = {("engine", "engine"): 96.0, ("engine", "kernel"): 46.0, ("kernel", "engine"): 60.0, ("kernel", "kernel"): 70.0}
    assert choose({"engine": 42.0, "kernel": 50.0}, both) == ("engine", "engine")


def test_slow_methods_are_not_measured_in_pairs() -> None:
    assert choose({"engine": 6.0, "kernel": 50.0}, {("kernel", "kernel"): 70.0}) == ("kernel", "kernel")


def copies_of(page_bytes: int, block_ids: list[int], chunk_ids: list[int], chunks_per_piece: int = 2) -> PageCopies:
    host = HostMemory(6, 4096, pin=False, progress=lambda *_: None, piece_bytes=chunks_per_piece * 4096)
    blocks, chunks = np.array(block_ids), np.array(chunk_ids)
    return PageCopies(torch.zeros(8, page_bytes, dtype=torch.uint8), blocks, host, chunks, np.zeros_like(chunks))


def test_table_falls_back_for_what_was_not_measured_or_is_not_supported() -> None:
    fallback = TorchCopy()
    table = MethodTable(fallback)
    table.set(4096, "load", KERNEL)
    table.set(4096, "store", Named("unable", able=False))
    copies = copies_of(4096, [0], [0])
    assert table.choose(copies, "load") is KERNEL
    assert table.choose(copies, "store") is fallback
    assert table.choose(copies_of(2048, [0], [0]), "load") is fallback


def test_runs_join_neighbours_and_stop_at_the_border_of_a_piece() -> None:
    runs = merge_runs(copies_of(4096, [2, 3, 4, 5, 7], [0, 1, 2, 3, 4]))
    assert runs.device_offsets.tolist() == [8192, 16384, 28672]
    assert runs.host_pieces.tolist() == [0, 1, 2]
    assert runs.host_offsets.tolist() == [0, 0, 0]
    assert runs.sizes.tolist() == [8192, 8192, 4096]


def test_host_copy_is_for_cpu_tensors() -> None:
    assert HostCopy().supports(copies_of(4096, [0], [0]))


def test_a_driver_without_batches_is_named() -> None:
    with pytest.raises(DriverError, match="older than CUDA"):
        BatchCopy(load=lambda: ctypes.CDLL(None))
