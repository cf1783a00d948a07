"""Allocates device memory by tag, so that it can sleep, wake up and be shared: CuMem pools under
torch's caching allocator, MemPools whose segments come from an ``AllocationTable``.

A MemPool lives while something is allocated under its tag, and is let go then: torch gives back at
once the segments that only temporaries have used, and the others when their last tensor is gone and
its cache is emptied.

torch calls back through ctypes for every segment that it takes or gives back, perhaps late in the
interpreter's exit. C++ must not find a callback that is gone, so callbacks are kept for the life of
the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch

from pdlaunch.engine.memory.allocations import AllocationTable, ExportedHandle
from pdlaunch.engine.memory.driver import CudaMemoryDriver, DriverRefused
from pdlaunch.errors import ConfigError, MemoryPoolError
from pdlaunch.machine.allocator_conf import VARIABLES, expandable_segments_variable

WEIGHTS = "weights"
KV_CACHE = "kv_cache"
TAGS = (WEIGHTS, KV_CACHE)


class MemoryPools(ABC):
    """Allocates device memory by tag."""

    @abstractmethod
    def memory_pool(self, tag: str) -> AbstractContextManager[None]:
        """Allocate under ``tag`` whatever this thread allocates inside the block; temporaries too,
        until they are freed.
        """

    @abstractmethod
    def sleep(self, tags: Collection[str], keep: Collection[str] = ()) -> int:
        """Give the memory of ``tags`` back to the device; tensors keep their addresses and must not
        be used.

        Bytes of tags in ``keep`` wait in page-locked host memory. Returns the bytes given back.
        Raises MemoryPoolError; then nothing has changed.
        """

    @abstractmethod
    def wake_up(self, tags: Collection[str]) -> int:
        """Take memory for ``tags`` again, at the same addresses; what was not kept is undefined.
        Returns the bytes taken.

        Raises MemoryPoolError when the device has too little; then they sleep on.
        """

    @property
    @abstractmethod
    def sleeping_tags(self) -> frozenset[str]: ...

    @abstractmethod
    def exported_handle(self, address: int) -> ExportedHandle | None:
        """Return the handle of the awake allocation that holds an address, for a peer that maps it;
        the caller closes a descriptor.

        Return None when the address is not of these pools. Raises MemoryPoolError.
        """


class NoMemoryPools(MemoryPools):
    """Stands for pools while ``enable_cumem_allocator`` is off: torch allocates as ever."""

    def memory_pool(self, tag: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def sleep(self, tags: Collection[str], keep: Collection[str] = ()) -> int:
        raise MemoryPoolError(
            "memory that was not allocated from CuMem pools cannot sleep: switch enable_sleep_mode "
            "on"
        )

    def wake_up(self, tags: Collection[str]) -> int:
        raise MemoryPoolError("memory that was not allocated from CuMem pools does not sleep")

    @property
    def sleeping_tags(self) -> frozenset[str]:
        return frozenset()

    def exported_handle(self, address: int) -> ExportedHandle | None:
        return None


class TorchAllocatorSettings:
    """Reads and writes the settings of this process."""

    def read(self) -> str:
        """Raises KeyError when this version of torch reports them in an unknown way."""
        get = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
        if get is not None:
            return str(get())
        # torch 2.11 tells them in snapshots only.
        found: dict[str, Any] = torch.cuda.memory._snapshot()["allocator_settings"]
        return str(next(found[name] for name in VARIABLES if name in found))

    def write(self, text: str) -> None:
        accelerator: Any = torch._C
        accelerator._accelerator_setAllocatorSettings(text)


@contextlib.contextmanager
def expandable_segments_off(settings: TorchAllocatorSettings) -> Iterator[None]:
    """Switch expandable segments off inside the block: they reserve addresses themselves, and so
    bypass a pool's allocator.
    """
    before = settings.read()
    if not expandable_segments_variable({VARIABLES[0]: before}):
        yield
        return
    settings.write(f"{before},expandable_segments:False")
    try:
        yield
    finally:
        settings.write(before)


logger = logging.getLogger(__name__)

_Malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)


def open_memory_pools(*, enabled: bool, device: torch.device) -> MemoryPools:
    """Open the pools of a rank. ``enabled`` is ``enable_cumem_allocator``, which is never left out:
    raises ConfigError for another device than a GPU, and MemoryPoolError.
    """
    if not enabled:
        return NoMemoryPools()
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
    return CuMemPools(AllocationTable(driver), device)


class CuMemPools(MemoryPools):
    """Pools of one device; at most one object of this class lives in a process, until ``close``."""

    _owner_lock: ClassVar = threading.Lock()
    _owner: ClassVar[CuMemPools | None] = None
    """The one object that owns pools. Sleeping frees memory that others in this process may know:
    two owners would pull it away from under each other.
    """

    def __init__(
        self,
        table: AllocationTable,
        device: torch.device,
        settings: TorchAllocatorSettings | None = None,
    ) -> None:
        """Raises MemoryPoolError when this process has pools already."""
        self.table = table
        self._device = device
        self._settings = settings or TorchAllocatorSettings()
        self._allocators: dict[str, _TagAllocator] = {}
        with CuMemPools._owner_lock:
            owner = CuMemPools._owner
            if owner is not None:
                raise MemoryPoolError(
                    f"process {os.getpid()} has CuMem pools already, on {owner._device}: close "
                    "them first, "
                    f"or give {device} a process of its own"
                )
            CuMemPools._owner = self

    @contextlib.contextmanager
    def memory_pool(self, tag: str) -> Iterator[None]:
        allocator = self._allocators.get(tag)
        if allocator is None:
            allocator = self._allocators[tag] = _TagAllocator(self.table, tag)
        mem_pool = torch.cuda.MemPool(allocator.allocator)
        with (
            expandable_segments_off(self._settings),
            torch.cuda.use_mem_pool(mem_pool, self._device),
        ):
            yield
        # The segments of temporaries go back to the device now; tensors keep their own.
        del mem_pool
        torch.cuda.empty_cache()

    def sleep(self, tags: Collection[str], keep: Collection[str] = ()) -> int:
        return self.table.sleep(tags, keep)

    def wake_up(self, tags: Collection[str]) -> int:
        return self.table.wake(tags)

    @property
    def sleeping_tags(self) -> frozenset[str]:
        return self.table.sleeping_tags

    def exported_handle(self, address: int) -> ExportedHandle | None:
        return self.table.exported_handle(address)

    def close(self) -> None:
        """Give everything back, and let others own pools. Raises MemoryPoolError while a tensor
        lives in one of them.
        """
        torch.cuda.empty_cache()
        if num_bytes := self.table.num_bytes():
            raise MemoryPoolError(
                f"{num_bytes} bytes of the CuMem pools are still in use by tensors"
            )
        with CuMemPools._owner_lock:
            CuMemPools._owner = None


class _TagAllocator:
    """Gives torch the segments of one tag and takes them back."""

    def __init__(self, table: AllocationTable, tag: str) -> None:
        self._table = table
        self._tag = tag
        callbacks = _Malloc(self._malloc), _Free(self._free)
        malloc, free = (ctypes.cast(callback, ctypes.c_void_p).value for callback in callbacks)
        internals: Any = torch._C
        self.allocator = internals._cuda_customAllocator(malloc, free)
        _keep_forever((callbacks, self.allocator))

    def _malloc(self, num_bytes: int, device: int, stream: int) -> int | None:
        """Return NULL when there is no memory: torch then frees what it can, asks again, and raises
        OutOfMemoryError.
        """
        try:
            return self._table.allocate(num_bytes, self._tag)
        except Exception as error:
            logger.warning("%s", error)
            return None

    def _free(self, address: int, num_bytes: int, device: int, stream: int) -> None:
        try:
            self._table.free(address)
        except Exception:
            logger.exception("memory of %r at %#x was not given back", self._tag, address)


def _keep_forever(thing: object) -> None:
    """Hold one reference that nobody drops, not even the interpreter's exit."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
