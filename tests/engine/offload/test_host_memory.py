"""Host memory is pinned piece by piece, and whoever waits for it hears of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pdlaunch.engine.offload.host_memory import HostMemory
from pdlaunch.errors import ConfigError

CHUNK_BYTES = 4096


class Pages:
    """What is asked of the driver, and what is said of it, in order."""

    def __init__(self, *, num_pinnable: int = 100) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.pinned: dict[int, int] = {}
        """Bytes by address."""
        self._num_pinnable = num_pinnable

    def register(self, address: int, num_bytes: int) -> int:
        if len(self.pinned) == self._num_pinnable:
            return 2
        self.pinned[address] = num_bytes
        self.calls.append(("pinned", num_bytes))
        return 0

    def host_memory(self, *, pin: bool = True) -> HostMemory:
        """Seven chunks in pieces of three."""
        return HostMemory(
            7,
            CHUNK_BYTES,
            pin=pin,
            progress=lambda *report: self.calls.append(report),
            piece_bytes=3 * CHUNK_BYTES + 100,
            register=self.register,
            unregister=self.pinned.__delitem__,
        )


def test_each_piece_is_pinned_once_and_told_of() -> None:
    pages = Pages()
    memory = pages.host_memory()
    assert pages.calls == [
        ("pinned", 3 * CHUNK_BYTES),
        ("pinning host memory", 3 / 7),
        ("pinned", 3 * CHUNK_BYTES),
        ("pinning host memory", 6 / 7),
        ("pinned", CHUNK_BYTES),
        ("pinning host memory", 1.0),
    ]
    assert list(pages.pinned) == memory.piece_addresses.tolist()
    pieces, offsets = memory.places(np.arange(7))
    for chunk_id, address in enumerate((memory.piece_addresses[pieces] + offsets).tolist()):
        assert any(
            first <= address <= address + CHUNK_BYTES <= first + size
            for first, size in pages.pinned.items()
        )
        assert memory.chunk(chunk_id).data_ptr() == address
    memory.close()
    assert pages.pinned == {}


def test_a_piece_that_cannot_be_pinned_ends_the_start() -> None:
    pages = Pages(num_pinnable=2)
    with pytest.raises(ConfigError, match="pinning 4096 bytes failed with CUDA error 2") as error:
        pages.host_memory()
    assert error.value.field == "kv_offload.host_memory"


def test_without_a_gpu_nothing_is_pinned_and_nothing_is_told() -> None:
    pages = Pages()
    pages.host_memory(pin=False).close()
    assert pages.calls == []
