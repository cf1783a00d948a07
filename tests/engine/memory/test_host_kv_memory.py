import fcntl
import mmap
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from pdlaunch.engine.memory.kv_memory import Export, HostKVMemory, NotShareable, SharedRange
from pdlaunch.errors import MemoryPoolError
from tests.engine.memory.open_files import num_open_fds

PAGE = mmap.PAGESIZE


@pytest.fixture
def export() -> Iterator[Export]:
    memory = HostKVMemory()
    tensor = memory.zeros(16 * PAGE)
    found = memory.export(tensor)
    yield found
    found.close()
    del tensor


def test_memory_that_is_not_there_is_named() -> None:
    with pytest.raises(MemoryPoolError, match="lower kv_cache_memory"):
        HostKVMemory().zeros(2**62)


def test_readers_can_neither_write_nor_shrink(export: Export) -> None:
    assert export.fd is not None
    with pytest.raises(PermissionError):
        os.ftruncate(export.fd, 0)
    with pytest.raises(PermissionError):
        mmap.mmap(export.fd, PAGE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_bytes": 16 * PAGE + 1}, "not within"),
        ({"offset_bytes": -1}, "not within"),
        ({"offset_bytes": 16 * PAGE}, "not within"),
        ({"num_bytes": 0}, "not within"),
        ({"allocation_bytes": 17 * PAGE}, f"has {16 * PAGE} bytes, but it states {17 * PAGE}"),
        ({"kind": "posix_fd"}, "cannot map memory of kind posix_fd"),
    ],
)
def test_what_a_peer_describes_wrongly_is_not_mapped(
    change: dict[str, object], reason: str, export: Export
) -> None:
    before = num_open_fds()
    with pytest.raises(NotShareable, match=reason):
        HostKVMemory().map(replace(export.range, **change), export.fd)  # type: ignore[arg-type]
    assert num_open_fds() == before


def test_memory_that_may_shrink_under_its_reader_is_not_mapped() -> None:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    memory, whole = HostKVMemory(), SharedRange("memfd", PAGE, 0, PAGE)
    with pytest.raises(NotShareable, match="not sealed"):
        memory.map(whole, fd)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    memory.map(whole, fd).close()
    os.close(fd)
    with pytest.raises(NotShareable, match="cannot be mapped"):
        memory.map(whole, fd)


def test_other_memory_is_not_shared() -> None:
    with pytest.raises(NotShareable, match="was not made for sharing"):
        HostKVMemory().export(torch.zeros(8))
