"""Offers the pools as the engine uses them: allocate under a tag, sleep, wake up, share."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import AbstractContextManager

from pdlaunch.engine.memory.allocations import ExportedHandle
from pdlaunch.errors import MemoryPoolError

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
