"""Allocates device memory by tag, so that it can sleep, wake up and be shared: CuMem pools under
torch's caching allocator, MemPools whose segments come from ``CuMemPools.allocate``.

::

    allocate ──> awake ── sleep, kept ────▶ asleep, bytes in host memory ──┬─ wake up ──▶ awake,
                   │  └── sleep, dropped ─▶ asleep, bytes gone ────────────┘        same address
                   └──── free ────▶ gone      (also from asleep)

Address ranges live from ``allocate`` to ``free``; physical memory only while awake.

A MemPool lives while something is allocated under its tag, and is let go then: torch gives back at
once the segments that only temporaries have used, and the others when their last tensor is gone and
its cache is emptied.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from pdlaunch.engine.memory.driver import CudaMemoryDriver, DriverRefused, Handle
from pdlaunch.engine.memory.kv_memory import Export, SharedRange
from pdlaunch.errors import ConfigError, MemoryPoolError
from pdlaunch.machine.host import ALLOCATOR_VARIABLES, expandable_segments_variable

WEIGHTS = "weights"
KV_CACHE = "kv_cache"
TAGS = (WEIGHTS, KV_CACHE)

logger = logging.getLogger(__name__)

_Malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)


def read_allocator_settings() -> str:
    """Raises KeyError when this version of torch reports them in an unknown way."""
    get = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if get is not None:
        return str(get())
    # torch 2.11 tells them in snapshots only.
    found: dict[str, Any] = torch.cuda.memory._snapshot()["allocator_settings"]
    return str(next(found[name] for name in ALLOCATOR_VARIABLES if name in found))


@contextlib.contextmanager
def expandable_segments_off() -> Iterator[None]:
    """Turn expandable segments off inside the block, because they bypass a pool's allocator."""
    before = read_allocator_settings()
    if not expandable_segments_variable({ALLOCATOR_VARIABLES[0]: before}):
        yield
        return
    accelerator: Any = torch._C
    accelerator._accelerator_setAllocatorSettings(f"{before},expandable_segments:False")
    try:
        yield
    finally:
        accelerator._accelerator_setAllocatorSettings(before)


class MemoryPools:
    """Allocates device memory by tag. This class uses torch's allocator unchanged, for ranks with
    ``enable_cumem_allocator`` off.
    """

    def memory_pool(self, tag: str) -> AbstractContextManager[None]:
        """Allocate under ``tag`` what this thread allocates inside the block, temporaries too."""
        return contextlib.nullcontext()

    def sleep(self, tags: Collection[str], keep: Collection[str] = ()) -> int:
        """Give the memory of ``tags`` back to the device; tensors keep their addresses and must not
        be used.

        Bytes of tags in ``keep`` wait in page-locked host memory. Returns the bytes given back.
        Raises MemoryPoolError; then nothing has changed.
        """
        raise MemoryPoolError(
            "memory that was not allocated from CuMem pools cannot sleep: switch enable_sleep_mode "
            "on"
        )

    def wake_up(self, tags: Collection[str]) -> int:
        """Take memory for ``tags`` again, at the same addresses; what was not kept is undefined.
        Returns the bytes taken.

        Raises MemoryPoolError when the device has too little; then they sleep on.
        """
        raise MemoryPoolError("memory that was not allocated from CuMem pools does not sleep")

    @property
    def sleeping_tags(self) -> frozenset[str]:
        return frozenset()

    def export(self, start: int, num_bytes: int) -> Export | None:
        """Export a range of an awake allocation, for a peer that maps it; None when its start is
        not in these pools. Raises MemoryPoolError.
        """
        return None


def open_memory_pools(*, enabled: bool, device: torch.device) -> MemoryPools:
    """Open the pools of a rank. ``enabled`` is ``enable_cumem_allocator``, which is never left out:
    raises ConfigError for another device than a GPU, and MemoryPoolError.
    """
    if not enabled:
        return MemoryPools()
    if device.type != "cuda":
        raise ConfigError(
            f"cumem allocator is not supported on the current platform: the device is {device}",
            field="enable_cumem_allocator",
            value=True,
            fix="switch the CuMem allocator and sleep mode off, or run on a CUDA device",
        )
    with torch.cuda.device(device):
        # Makes the primary context, and makes it current in this thread.
        torch.cuda.current_stream().synchronize()
        try:
            driver = CudaMemoryDriver(torch.cuda.current_device())
        except DriverRefused as error:
            raise MemoryPoolError(f"{device} cannot map memory: {error}") from error
    return CuMemPools(driver, device)


@dataclass(slots=True)
class _Allocation:
    """Describes one address range of one tag."""

    tag: str
    address: int
    num_bytes: int  # a multiple of the driver's page
    handle: Handle | None = None  # physical memory; None: asleep
    backup: Any = None  # host memory with the bytes; only while asleep


class CuMemPools(MemoryPools):
    """Owns the memory of a device's pools. ``memory_pool`` is for one thread, all else for any."""

    def __init__(self, driver: CudaMemoryDriver, device: torch.device) -> None:
        self._driver = driver
        self._device = device
        self._allocations: dict[int, _Allocation] = {}
        self._sleeping_tags: set[str] = set()
        self._allocators: dict[str, Any] = {}
        # Freeing a tensor in the middle of a call may bring ``free`` into the same thread.
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def memory_pool(self, tag: str) -> Iterator[None]:
        if tag not in self._allocators:
            self._allocators[tag] = _new_allocator(self, tag)
        mem_pool = torch.cuda.MemPool(self._allocators[tag])
        with expandable_segments_off(), torch.cuda.use_mem_pool(mem_pool, self._device):
            yield
        # The segments of temporaries go back to the device now; tensors keep their own.
        del mem_pool
        torch.cuda.empty_cache()

    @property
    def sleeping_tags(self) -> frozenset[str]:
        return frozenset(self._sleeping_tags)

    def num_bytes(self, tag: str | None = None) -> int:
        """Return the bytes of all address ranges, or of those of a tag."""
        with self._lock:
            return sum(
                found.num_bytes for found in self._allocations.values() if tag in (None, found.tag)
            )

    def allocate(self, num_bytes: int, tag: str) -> int:
        """Return the start of an address range with memory behind it. Raises MemoryPoolError."""
        with self._lock:
            if tag in self._sleeping_tags:
                raise MemoryPoolError(
                    f"{num_bytes} bytes were asked of the pool {tag!r} while it sleeps"
                )
            pages_bytes = -(-num_bytes // self._driver.page_bytes) * self._driver.page_bytes
            try:
                address = self._driver.reserve(pages_bytes)
                allocation = _Allocation(tag, address, pages_bytes)
                try:
                    self._back(allocation)
                except DriverRefused:
                    self._driver.free_address(address, pages_bytes)
                    raise
            except DriverRefused as error:
                raise MemoryPoolError(
                    f"no memory for {pages_bytes} bytes of {tag!r}: {error}"
                ) from error
            self._allocations[address] = allocation
            return address

    def free(self, address: int) -> None:
        """Give back an allocation, asleep or awake, that nothing uses. Raises DriverRefused."""
        with self._lock:
            allocation = self._allocations.pop(address)
            if allocation.handle is not None:
                # Queued work may still use the range, which must not be unmapped under it.
                self._driver.synchronize()
                self._unback(allocation)
            self._drop_backup(allocation)
            self._driver.free_address(address, allocation.num_bytes)

    def sleep(self, tags: Collection[str], keep: Collection[str] = ()) -> int:
        with self._lock:
            falling_asleep = [found for found in self._awake() if found.tag in tags]
            try:
                self._driver.synchronize()
                # Only behind that: a queued step may still write what is copied.
                self._back_up(found for found in falling_asleep if found.tag in keep)
            except DriverRefused as error:
                self._let_copies_end()
                for allocation in falling_asleep:
                    self._drop_backup(allocation)
                raise MemoryPoolError(f"the pools cannot sleep: {error}") from error
            for allocation in falling_asleep:
                self._unback(allocation)
            self._sleeping_tags.update(tags)
            return sum(found.num_bytes for found in falling_asleep)

    def wake_up(self, tags: Collection[str]) -> int:
        with self._lock:
            asleep = [found for found in self._allocations.values() if found.handle is None]
            waking = [found for found in asleep if found.tag in tags]
            num_bytes = sum(found.num_bytes for found in waking)
            try:
                for allocation in waking:
                    self._back(allocation)
                for allocation in waking:
                    if allocation.backup is not None:
                        self._driver.copy_to_device(
                            allocation.address, allocation.backup, allocation.num_bytes
                        )
                self._driver.synchronize()
            except DriverRefused as error:
                self._let_copies_end()
                for allocation in waking:
                    if allocation.handle is not None:
                        self._unback(allocation)
                raise MemoryPoolError(
                    f"{num_bytes} bytes of {', '.join(sorted(tags))} cannot wake up: {error}"
                ) from error
            # Not before all copies have ended: after a failure everything sleeps on with its bytes.
            for allocation in waking:
                self._drop_backup(allocation)
            self._sleeping_tags.difference_update(tags)
            return num_bytes

    def export(self, start: int, num_bytes: int) -> Export | None:
        with self._lock:
            for found in self._awake():
                if found.address <= start < found.address + found.num_bytes:
                    return self._export(found, start, num_bytes)
            return None

    def _export(self, found: _Allocation, start: int, num_bytes: int) -> Export:
        assert found.handle is not None
        try:
            handle = self._driver.export(found.handle)
        except DriverRefused as error:
            raise MemoryPoolError(f"memory of {found.tag!r} cannot be shared: {error}") from error
        fabric, fd = (b"", handle) if isinstance(handle, int) else (handle, None)
        offset = start - found.address
        shared = SharedRange(self._driver.handle_kind, found.num_bytes, offset, num_bytes, fabric)
        return Export(shared, fd)

    def _awake(self) -> list[_Allocation]:
        return [found for found in self._allocations.values() if found.handle is not None]

    def _back(self, allocation: _Allocation) -> None:
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

    def _unback(self, allocation: _Allocation) -> None:
        handle, allocation.handle = allocation.handle, None
        assert handle is not None
        self._driver.unmap(allocation.address, allocation.num_bytes)
        self._driver.release(handle)

    def _back_up(self, allocations: Iterable[_Allocation]) -> None:
        for allocation in allocations:
            allocation.backup = self._driver.allocate_host(allocation.num_bytes)
            self._driver.copy_to_host(allocation.backup, allocation.address, allocation.num_bytes)
        self._driver.synchronize()

    def _let_copies_end(self) -> None:
        with contextlib.suppress(DriverRefused):
            self._driver.synchronize()

    def _drop_backup(self, allocation: _Allocation) -> None:
        if allocation.backup is not None:
            self._driver.free_host(allocation.backup)
            allocation.backup = None


def _new_allocator(pools: CuMemPools, tag: str) -> Any:
    """Make the allocator by which torch takes and gives back the segments of one tag."""

    def malloc(num_bytes: int, _device: int, _stream: int) -> int | None:
        # NULL when there is no memory: torch then frees what it can, asks again, and raises
        # OutOfMemoryError.
        try:
            return pools.allocate(num_bytes, tag)
        except Exception as error:
            logger.warning("%s", error)
            return None

    def free(address: int, _num_bytes: int, _device: int, _stream: int) -> None:
        try:
            pools.free(address)
        except Exception:
            logger.exception("memory of %r at %#x was not given back", tag, address)

    callbacks = _Malloc(malloc), _Free(free)
    addresses = (ctypes.cast(callback, ctypes.c_void_p).value for callback in callbacks)
    internals: Any = torch._C
    allocator = internals._cuda_customAllocator(*addresses)
    # One reference that nobody drops: torch calls back perhaps late in the interpreter's exit, and
    # C++ must not find a callback that is gone.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object((callbacks, allocator)))
    return allocator
