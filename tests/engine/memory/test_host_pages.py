"""Pages that are there, by the kernel's own word."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from pdlaunch.engine.memory.host_pages import THREAD_BYTES, address_of, map_pages, touch_pages

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
IS_PRESENT = 1 << 63


def num_present_pages(address: int, num_bytes: int) -> int:
    """Source: the kernel's documentation of /proc/PID/pagemap, one 64-bit entry a page."""
    first, last = address // PAGE_BYTES, (address + num_bytes - 1) // PAGE_BYTES
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(first * 8)
        entries = struct.unpack(f"<{last - first + 1}Q", pagemap.read((last - first + 1) * 8))
    return sum(bool(entry & IS_PRESENT) for entry in entries)


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs the kernel's word")
@pytest.mark.parametrize("num_bytes", [1, 5 * PAGE_BYTES, 3 * THREAD_BYTES + PAGE_BYTES + 1])
def test_pages_are_there_once_touched_and_blank(num_bytes: int) -> None:
    memory = map_pages(num_bytes)
    num_pages = -(-num_bytes // PAGE_BYTES)
    assert num_present_pages(address_of(memory), num_bytes) < num_pages
    touch_pages(memory)
    assert num_present_pages(address_of(memory), num_bytes) == num_pages
    assert not any(memory[:])
    memory.close()
