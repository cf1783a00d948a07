"""Keeps the table of all allocations of the pools: their addresses, physical memory and tag, and
where their bytes are while they sleep.

::

    allocate ──> awake ── sleep, kept ────▶ asleep, bytes in host memory ──┬─ wake ──▶ awake,
                   │  └── sleep, dropped ─▶ asleep, bytes gone ────────────┘     same address
                   └──── free ────▶ gone      (also from asleep)

Address ranges live from ``allocate`` to ``free``; physical memory only while awake.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from pdlaunch.engine.memory.driver import CudaMemoryDriver, DriverRefused, Handle, HandleKind
from pdlaunch.errors import MemoryPoolError


@dataclass(slots=True)
class Allocation:
    """Describes one address range of one tag."""

    tag: str
    address: int
    num_bytes: int  # a multiple of the driver's page
    handle: Handle | None  # physical memory; None: asleep
    backup: Any = None  # host memory with the bytes; only while asleep


@dataclass(frozen=True, slots=True)
class ExportedHandle:
    """Describes an allocation to a peer that imports it."""

    tag: str
    address: int  # address in this process
    num_bytes: int
    kind: HandleKind
    handle: int | bytes
    """A file descriptor, which the receiver of this object closes, or the 64 bytes of a fabric
    handle.
    """


class AllocationTable:
    """Owns all address ranges and physical memory of the pools. Any thread may call it."""

    def __init__(self, driver: CudaMemoryDriver) -> None:
        self._driver = driver
        self._allocations: dict[int, Allocation] = {}
        self._sleeping_tags: set[str] = set()
        # Freeing a tensor in the middle of a call may bring ``free`` into the same thread.
        self._lock = threading.RLock()

    @property
    def sleeping_tags(self) -> frozenset[str]:
        return frozenset(self._sleeping_tags)

    def num_bytes(self, tag: str | None = None) -> int:
        """Return the bytes of all address ranges, or of those of a tag."""
        with self._lock:
            return sum(found.num_bytes for found in self._of(tag))

    def allocate(self, num_bytes: int, tag: str) -> int:
        """Return the start of an address range with memory behind it. Raises MemoryPoolError; then
        nothing is held.
        """
        with self._lock:
            if tag in self._sleeping_tags:
                raise MemoryPoolError(
                    f"{num_bytes} bytes were asked of the pool {tag!r} while it sleeps"
                )
            pages_bytes = -(-num_bytes // self._driver.page_bytes) * self._driver.page_bytes
            try:
                address = self._driver.reserve(pages_bytes)
            except DriverRefused as error:
                raise MemoryPoolError(
                    f"no addresses for {pages_bytes} bytes of {tag!r}: {error}"
                ) from error
            allocation = Allocation(tag, address, pages_bytes, None)
            try:
                self._back(allocation)
            except DriverRefused as error:
                self._driver.free_address(address, pages_bytes)
                raise MemoryPoolError(
                    f"no memory for {pages_bytes} bytes of {tag!r}: {error}"
                ) from error
            self._allocations[address] = allocation
            return address

    def free(self, address: int) -> None:
        """Give back an allocation, asleep or awake; nothing uses it any more. Raises
        DriverRefused.
        """
        with self._lock:
            allocation = self._allocations.pop(address)
            if allocation.handle is not None:
                # Queued work may still use the range, which must not be unmapped under it.
                self._driver.synchronize()
                self._unback(allocation)
            self._drop_backup(allocation)
            self._driver.free_address(address, allocation.num_bytes)

    def sleep(self, tags: Collection[str], keep: Collection[str]) -> int:
        """Give the physical memory of ``tags`` back; bytes of those in ``keep`` go to host memory.
        Returns bytes given back.

        Raises MemoryPoolError when host memory is short; then nothing has changed.
        """
        with self._lock:
            falling_asleep = [found for found in self._awake() if found.tag in tags]
            try:
                self._driver.synchronize()
                # Only behind that: a queued step may still write what is copied.
                self._back_up([found for found in falling_asleep if found.tag in keep])
            except DriverRefused as error:
                self._let_copies_end()
                for allocation in falling_asleep:
                    self._drop_backup(allocation)
                raise MemoryPoolError(f"the pools cannot sleep: {error}") from error
            for allocation in falling_asleep:
                self._unback(allocation)
            self._sleeping_tags.update(tags)
            return sum(found.num_bytes for found in falling_asleep)

    def wake(self, tags: Collection[str]) -> int:
        """Put memory behind the addresses of ``tags`` again, with their bytes where they were kept.
        Returns bytes taken.

        Raises MemoryPoolError when the device has too little memory; then all of them sleep on.
        """
        with self._lock:
            waking = [
                found
                for found in self._allocations.values()
                if found.handle is None and found.tag in tags
            ]
            woken = []
            try:
                for allocation in waking:
                    self._back(allocation)
                    woken.append(allocation)
                for allocation in waking:
                    if allocation.backup is not None:
                        self._driver.copy_to_device(
                            allocation.address, allocation.backup, allocation.num_bytes
                        )
                self._driver.synchronize()
            except DriverRefused as error:
                self._let_copies_end()
                for allocation in woken:
                    self._unback(allocation)
                wanted = sum(found.num_bytes for found in waking)
                raise MemoryPoolError(
                    f"{wanted} bytes of {', '.join(sorted(tags))} cannot wake up: {error}"
                ) from error
            # Not before all copies have ended: after a failure everything sleeps on with its bytes.
            for allocation in waking:
                self._drop_backup(allocation)
            self._sleeping_tags.difference_update(tags)
            return sum(found.num_bytes for found in waking)

    def exported_handle(self, address: int) -> ExportedHandle | None:
        """Export the awake allocation that holds an address; return None when there is none. Raises
        MemoryPoolError.
        """
        with self._lock:
            for found in self._awake():
                if found.address <= address < found.address + found.num_bytes:
                    return self._export(found)
            return None

    def check_integrity(self) -> None:
        """Prove that ranges do not overlap and that exactly the awake ones hold memory. Raises
        AssertionError.
        """
        with self._lock:
            end = 0
            for address, found in sorted(self._allocations.items()):
                assert address == found.address >= end, "address ranges overlap"
                assert found.num_bytes > 0, "an empty range"
                assert found.num_bytes % self._driver.page_bytes == 0, (
                    "a range that is no number of pages"
                )
                assert (found.handle is None) == (found.tag in self._sleeping_tags), (
                    "memory and tag do not agree"
                )
                assert found.backup is None or found.handle is None, (
                    "an awake allocation has a backup"
                )
                end = address + found.num_bytes

    def _of(self, tag: str | None) -> Iterable[Allocation]:
        return [found for found in self._allocations.values() if tag is None or found.tag == tag]

    def _awake(self) -> list[Allocation]:
        return [found for found in self._allocations.values() if found.handle is not None]

    def _back(self, allocation: Allocation) -> None:
        """Put physical memory behind the range. Raises DriverRefused; then there is none."""
        driver, address, num_bytes = self._driver, allocation.address, allocation.num_bytes
        handle = driver.create(num_bytes)
        try:
            driver.map(address, num_bytes, handle)
        except DriverRefused:
            driver.release(handle)
            raise
        # From here on ``_unback`` undoes both.
        allocation.handle = handle
        try:
            driver.set_access(address, num_bytes)
        except DriverRefused:
            self._unback(allocation)
            raise

    def _export(self, found: Allocation) -> ExportedHandle:
        assert found.handle is not None
        try:
            handle = self._driver.export(found.handle)
        except DriverRefused as error:
            raise MemoryPoolError(f"memory of {found.tag!r} cannot be shared: {error}") from error
        return ExportedHandle(
            found.tag, found.address, found.num_bytes, self._driver.handle_kind, handle
        )

    def _unback(self, allocation: Allocation) -> None:
        assert allocation.handle is not None
        handle, allocation.handle = allocation.handle, None
        self._driver.unmap(allocation.address, allocation.num_bytes)
        self._driver.release(handle)

    def _back_up(self, allocations: Iterable[Allocation]) -> None:
        for allocation in allocations:
            allocation.backup = self._driver.allocate_host(allocation.num_bytes)
            self._driver.copy_to_host(allocation.backup, allocation.address, allocation.num_bytes)
        self._driver.synchronize()

    def _let_copies_end(self) -> None:
        with contextlib.suppress(DriverRefused):
            self._driver.synchronize()

    def _drop_backup(self, allocation: Allocation) -> None:
        if allocation.backup is not None:
            self._driver.free_host(allocation.backup)
            allocation.backup = None
