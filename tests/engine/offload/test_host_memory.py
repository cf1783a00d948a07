"""Host memory is pinned piece by piece, and whoever waits for it hears of each."""

from __future__ import annotations

import numpy as np
import pytest

from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.errors import ConfigError

CHUNK_BYTES = 4096


class Pages:
    """What is pinned, by address, and what is told, of seven chunks in pieces of three."""

    def __init__(self, *, num_pinnable: int = 100) -> None:
        self.pinned: dict[int, int] = {}
        self.told: list[tuple[str, float | None]] = []
        self._num_pinnable = num_pinnable

    def register(self, address: int, num_bytes: int) -> int:
        if len(self.pinned) == self._num_pinnable:
            return 2
        self.pinned[address] = num_bytes
        return 0

    def host_memory(self, *, pin: bool = True) -> HostMemory:
        return HostMemory(
            7,
            CHUNK_BYTES,
            pin=pin,
            progress=lambda *report: self.told.append(report),
            piece_bytes=3 * CHUNK_BYTES + 100,
            register=self.register,
            unregister=self.pinned.__delitem__,
        )


def test_each_piece_is_pinned_once_and_told_of() -> None:
    pages = Pages()
    memory = pages.host_memory()
    assert pages.told == [("pinning host memory", share) for share in (3 / 7, 6 / 7, 1.0)]
    assert list(pages.pinned) == memory.piece_addresses.tolist()
    assert list(pages.pinned.values()) == [3 * CHUNK_BYTES, 3 * CHUNK_BYTES, CHUNK_BYTES]
    pieces, offsets = memory.places(np.arange(7))
    addresses = (memory.piece_addresses[pieces] + offsets).tolist()
    assert addresses == [memory.chunk(chunk_id).data_ptr() for chunk_id in range(7)]
    ends = [first + size for first, size in pages.pinned.items()]
    assert all(
        address + CHUNK_BYTES <= ends[piece]
        for piece, address in zip(pieces, addresses, strict=True)
    )
    memory.close()
    assert pages.pinned == {}


def test_a_piece_that_cannot_be_pinned_ends_the_start() -> None:
    with pytest.raises(ConfigError, match="pinning 4096 bytes failed with CUDA error 2") as error:
        Pages(num_pinnable=2).host_memory()
    assert error.value.field == "kv_offload.host_memory"


def test_without_a_gpu_nothing_is_pinned_and_nothing_is_told() -> None:
    pages = Pages()
    pages.host_memory(pin=False).close()
    assert (pages.pinned, pages.told) == ({}, [])
