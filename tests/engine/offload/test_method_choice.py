"""Which copy methods are chosen from what was measured."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from pdlaunch.engine.offload.copies import PageCopies, merge_runs
from pdlaunch.engine.offload.copy_methods import BatchCopy, CopyMethod, HostCopy, TorchCopy
from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.engine.offload.method_choice import MethodRates, MethodTable, measure_methods
from pdlaunch.engine.offload.spec import Direction
from pdlaunch.machine.cuda_driver import DriverError


class Named(CopyMethod):
    def __init__(self, name: str, *, able: bool = True) -> None:
        self.name = name
        self._able = able

    def supports(self, copies: PageCopies) -> bool:
        return self._able

    def copy(self, copies: PageCopies, direction: Direction) -> None:
        raise AssertionError


ENGINE, KERNEL = Named("engine"), Named("kernel")


def measure(alone: dict[str, float], both: dict[tuple[str, str], float]) -> MethodRates:
    return measure_methods(
        {"load": [ENGINE, KERNEL], "store": [ENGINE, KERNEL]},
        lambda method, _direction: alone[method.name],
        lambda load, store: both[load.name, store.name],
    )


def test_prefers_the_copy_engine_when_it_is_nearly_as_fast() -> None:
    both = dict.fromkeys(
        [("engine", "engine"), ("engine", "kernel"), ("kernel", "engine"), ("kernel", "kernel")],
        90.0,
    )
    rates = measure({"engine": 49.0, "kernel": 50.0}, both)
    assert rates.best_alone("load") is rates.best_alone("store") is ENGINE
    assert rates.best_pair() == (ENGINE, ENGINE)


def test_the_fastest_alone_is_not_used_beside_the_other_direction_when_it_starves_that() -> None:
    both = {
        ("engine", "engine"): 76.0,
        ("engine", "kernel"): 46.0,
        ("kernel", "engine"): 90.0,
        ("kernel", "kernel"): 60.0,
    }
    rates = measure({"engine": 42.0, "kernel": 50.0}, both)
    assert rates.best_alone("load") is rates.best_alone("store") is KERNEL
    assert rates.best_pair() == (KERNEL, ENGINE)
    table = MethodTable(TorchCopy())
    table.set(4096, rates)
    copies = copies_of(4096, [0], [0])
    assert table.choose(copies, "store", both_ways=False) is KERNEL
    assert table.choose(copies, "store", both_ways=True) is ENGINE


def test_slow_methods_are_not_measured_in_pairs() -> None:
    assert measure({"engine": 6.0, "kernel": 50.0}, {("kernel", "kernel"): 70.0}).best_pair() == (
        KERNEL,
        KERNEL,
    )


def copies_of(
    page_bytes: int, block_ids: list[int], chunk_ids: list[int], chunks_per_piece: int = 2
) -> PageCopies:
    host = HostMemory(
        6, 4096, pin=False, progress=lambda *_: None, piece_bytes=chunks_per_piece * 4096
    )
    blocks, chunks = np.array(block_ids), np.array(chunk_ids)
    return PageCopies(
        torch.zeros(8, page_bytes, dtype=torch.uint8), blocks, host, chunks, np.zeros_like(chunks)
    )


def test_table_falls_back_for_what_was_not_measured_or_is_not_supported() -> None:
    fallback = TorchCopy()
    table = MethodTable(fallback)
    unable = Named("unable", able=False)
    table.set(
        4096, MethodRates({"load": {KERNEL: 1.0}, "store": {unable: 1.0}}, {(KERNEL, unable): 2.0})
    )
    copies = copies_of(4096, [0], [0])
    assert table.choose(copies, "load", both_ways=True) is KERNEL
    assert table.choose(copies, "store", both_ways=True) is fallback
    assert table.choose(copies_of(2048, [0], [0]), "load", both_ways=False) is fallback


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
