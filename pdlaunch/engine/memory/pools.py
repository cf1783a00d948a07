"""Allocates device memory by tag, so that it can sleep, wake up and be shared. Torch's caching
allocator takes its segments from ``CuMemPools.allocate`` by way of MemPools.

::

    allocate ──> awake ── sleep, kept ────▶ asleep, bytes in host memory ──┬─ wake up ──▶ awake,
                   │  └── sleep, dropped ─▶ asleep, bytes gone ────────────┘        same address
                   └──── free ────▶ gone      (also from asleep)

An address range exists from ``allocate`` to ``free``, its physical memory only while awake.

Except in vLLM, a MemPool ends with the block of ``memory_pool``. Then torch frees segments without
tensors. Other segments are freed when their last tensor is gone and torch's cache is emptied.
"""

import contextlib
import ctypes
import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from pdlaunch.engine.memory.driver import CudaMemoryDriver, DriverRefused, Handle, HandleKind
from pdlaunch.engine.memory.kv_memory import (
    Export,
    HostKVMemory,
    KVMemory,
    NotShareable,
    PeerMapping,
    PrivateKVMemory,
    SharedRange,
)
from pdlaunch.errors import ConfigError, MemoryPoolError
from pdlaunch.machine.host import ALLOCATOR_VARIABLES, expandable_segments_variable

WEIGHTS = "weights"
KV_CACHE = "kv_cache"
TAGS = (WEIGHTS, KV_CACHE)

logger = logging.getLogger(__name__)

_Malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)


def read_allocator_settings() -> str:
    """Raises KeyError if this version of torch does not report them in a known way."""
    get = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if get is not None:
        return str(get())
    # torch 2.11 reports them only in snapshots.
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
    """Allocates device memory by tag. This class is for ranks with ``enable_cumem_allocator`` off,
    and uses torch's own allocator.
    """

    def memory_pool(self, tag: str) -> AbstractContextManager[None]:
        """Inside the block, this thread allocates under ``tag``, even temporary tensors."""
        return contextlib.nullcontext()

    def sleep(self, tags: Collection[str], keep: Collection[str] = ()) -> int:
        """Free the physical memory of ``tags``; return the number of bytes. Tensors keep their
        addresses but must not be used. The bytes of tags in ``keep`` are copied to page-locked host
        memory. Raises MemoryPoolError; then nothing has changed.
        """
        raise MemoryPoolError(
            "memory that was not allocated from CuMem pools cannot sleep: switch enable_sleep_mode "
            "on"
        )

    def wake_up(self, tags: Collection[str]) -> int:
        """Allocate physical memory for ``tags`` at the same addresses; return the number of bytes.
        Its contents are restored if they were kept, else undefined. Raises MemoryPoolError if the
        device has too little memory; then the tags still sleep.
        """
        raise MemoryPoolError("memory that was not allocated from CuMem pools does not sleep")

    @property
    def sleeping_tags(self) -> frozenset[str]:
        return frozenset()

    def export(self, start: int, num_bytes: int) -> Export | None:
        """Export a range of an awake allocation, so that a peer can map it. Return None if its
        start is not in these pools. Raises MemoryPoolError.
        """
        return None


def open_memory_pools(*, enabled: bool, device: torch.device) -> MemoryPools:
    """Open the pools of a rank. ``enabled``: ``enable_cumem_allocator``. If it cannot be honoured,
    raises ConfigError (the device is not a GPU) or MemoryPoolError.
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
        # Create the primary context and make it current in this thread.
        torch.cuda.current_stream().synchronize()
        try:
            driver = CudaMemoryDriver(torch.cuda.current_device())
        except DriverRefused as error:
            raise MemoryPoolError(f"{device} cannot map memory: {error}") from error
    return CuMemPools(driver, device)


@dataclass(slots=True)
class _Allocation:
    """An address range of one tag, with its physical memory or its copy in host memory."""

    tag: str
    address: int
    num_bytes: int  # a multiple of ``page_bytes``
    handle: Handle | None = None  # physical memory; None: asleep
    backup: Any = None  # host memory with the bytes; only while asleep


class CuMemPools(MemoryPools):
    """Owns the memory pools of a device. Thread-safe, except for ``memory_pool``."""

    def __init__(self, driver: CudaMemoryDriver, device: torch.device) -> None:
        self._driver = driver
        self._device = device
        self._allocations: dict[int, _Allocation] = {}
        self._sleeping_tags: set[str] = set()
        self._allocators: dict[str, Any] = {}
        # An RLock, because a tensor freed during a call may call ``free`` in the same thread.
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def memory_pool(self, tag: str) -> Iterator[None]:
        if tag not in self._allocators:
            self._allocators[tag] = _new_allocator(self, tag)
        mem_pool = torch.cuda.MemPool(self._allocators[tag])
        if has_others := "vllm" in sys.modules:
            # vLLM has MemPools too, and torch 2.11 aborts if one ends while another is in use.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(mem_pool))
        with expandable_segments_off(), torch.cuda.use_mem_pool(mem_pool, self._device):
            yield
        # Free the segments of temporary tensors now. Segments with tensors stay.
        del mem_pool
        if not has_others:
            torch.cuda.empty_cache()

    @property
    def sleeping_tags(self) -> frozenset[str]:
        return frozenset(self._sleeping_tags)

    def allocate(self, num_bytes: int, tag: str) -> int:
        """Allocate an address range with physical memory. Raises MemoryPoolError."""
        with self._lock:
            if tag in self._sleeping_tags:
                raise MemoryPoolError(
                    f"cannot allocate {num_bytes} bytes from pool {tag!r}: it is asleep"
                )
            pages_bytes = -(-num_bytes // self._driver.page_bytes) * self._driver.page_bytes
            try:
                address = self._driver.reserve(pages_bytes)
                allocation = _Allocation(tag, address, pages_bytes)
                try:
                    self._map(allocation)
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
        """Free an unused allocation, asleep or awake. Raises DriverRefused."""
        with self._lock:
            allocation = self._allocations.pop(address)
            if allocation.handle is not None:
                # Wait for queued work, which may still use the range.
                self._driver.synchronize()
                self._unmap(allocation)
            self._drop_backup(allocation)
            self._driver.free_address(address, allocation.num_bytes)

    def sleep(self, tags: Collection[str], keep: Collection[str] = ()) -> int:
        with self._lock:
            falling_asleep = [found for found in self._awake() if found.tag in tags]
            try:
                self._driver.synchronize()
                # After ``synchronize``, because queued work may still write to the memory.
                for found in falling_asleep:
                    if found.tag in keep:
                        found.backup = self._driver.allocate_host(found.num_bytes)
                        self._driver.copy_to_host(found.backup, found.address, found.num_bytes)
                self._driver.synchronize()
            except DriverRefused as error:
                self._finish_copies()
                for allocation in falling_asleep:
                    self._drop_backup(allocation)
                raise MemoryPoolError(f"the pools cannot sleep: {error}") from error
            for allocation in falling_asleep:
                self._unmap(allocation)
            self._sleeping_tags.update(tags)
            return sum(found.num_bytes for found in falling_asleep)

    def wake_up(self, tags: Collection[str]) -> int:
        with self._lock:
            asleep = [found for found in self._allocations.values() if found.handle is None]
            waking = [found for found in asleep if found.tag in tags]
            num_bytes = sum(found.num_bytes for found in waking)
            try:
                for allocation in waking:
                    self._map(allocation)
                for allocation in waking:
                    if allocation.backup is not None:
                        self._driver.copy_to_device(
                            allocation.address, allocation.backup, allocation.num_bytes
                        )
                self._driver.synchronize()
            except DriverRefused as error:
                self._finish_copies()
                for allocation in waking:
                    if allocation.handle is not None:
                        self._unmap(allocation)
                raise MemoryPoolError(
                    f"{num_bytes} bytes of {', '.join(sorted(tags))} cannot wake up: {error}"
                ) from error
            # Only after all copies have ended, because after a failure everything sleeps again.
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

    def _map(self, allocation: _Allocation) -> None:
        """Map new physical memory to the range. Raises DriverRefused; then nothing is mapped."""
        driver, address, num_bytes = self._driver, allocation.address, allocation.num_bytes
        handle = driver.create(num_bytes)
        try:
            driver.map(address, num_bytes, handle)
        except DriverRefused:
            driver.release(handle)
            raise
        # From here on, ``_unmap`` unmaps and releases.
        allocation.handle = handle
        try:
            driver.set_access(address, num_bytes)
        except DriverRefused:
            self._unmap(allocation)
            raise

    def _unmap(self, allocation: _Allocation) -> None:
        handle, allocation.handle = allocation.handle, None
        assert handle is not None
        self._driver.unmap(allocation.address, allocation.num_bytes)
        self._driver.release(handle)

    def _finish_copies(self) -> None:
        with contextlib.suppress(DriverRefused):
            self._driver.synchronize()

    def _drop_backup(self, allocation: _Allocation) -> None:
        if allocation.backup is not None:
            self._driver.free_host(allocation.backup)
            allocation.backup = None


def _new_allocator(pools: CuMemPools, tag: str) -> Any:
    """Make the allocator with which torch allocates and frees the segments of one tag."""

    def malloc(num_bytes: int, _device: int, _stream: int) -> int | None:
        # None is NULL: torch then frees cached memory, tries again, and at last raises
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
            logger.exception("memory of %r at %#x was not freed", tag, address)

    callbacks = _Malloc(malloc), _Free(free)
    addresses = (ctypes.cast(callback, ctypes.c_void_p).value for callback in callbacks)
    internals: Any = torch._C
    allocator = internals._cuda_customAllocator(*addresses)
    # Keep the callbacks forever, because torch may call them late in the interpreter's exit.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object((callbacks, allocator)))
    return allocator


def open_kv_memory(
    pools: MemoryPools, device: torch.device, *, shared: bool, mapped_alone: bool = False
) -> KVMemory:
    """Return the KV memory for a device. ``shared``: peers may map it. ``mapped_alone``: peers can
    only map it, so expandable segments are off for it on a GPU; PD204 refuses them for the others.
    """
    if device.type == "cpu":
        return HostKVMemory() if shared else PrivateKVMemory()
    return DeviceKVMemory(pools, device, mapped_alone=mapped_alone)


@dataclass(eq=False)
class DeviceKVMemory(KVMemory):
    """Allocates on one device, from a CuMem pool if there is one, else from torch's own allocator.
    Only the thread that owns the pools may call ``zeros``; any thread with the device's current
    context may call the other methods.

    CuMem allocations are exported by CuMem handles; torch's cudaMalloc allocations by CUDA IPC
    handles. Torch's expandable segments cannot be exported, so they are off in pools, and for
    memory that peers must map.
    """

    pools: MemoryPools
    device: torch.device
    # Takes the device index. It is called at the first export or map.
    new_driver: Callable[[int], CudaMemoryDriver] = CudaMemoryDriver
    mapped_alone: bool = False

    def zeros(self, num_bytes: int) -> torch.Tensor:
        segments = expandable_segments_off() if self.mapped_alone else contextlib.nullcontext()
        with segments, self.pools.memory_pool(KV_CACHE):
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)

    def export(self, tensor: torch.Tensor) -> Export:
        assert tensor.is_contiguous()
        start, num_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        try:
            export = self.pools.export(start, num_bytes) or self._export_plain(start, num_bytes)
        except MemoryPoolError as error:
            raise NotShareable(str(error)) from error
        try:
            export.range.check()
        except NotShareable:
            export.close()
            raise
        return export

    def map(self, shared: SharedRange, fd: int | None) -> PeerMapping:
        shared.check()
        try:
            match shared.kind:
                case "cuda_ipc":
                    return self._open_ipc(shared)
                case "fabric":
                    return self._import(shared, shared.kind, shared.handle)
                case "posix_fd" if fd is not None:
                    return self._import(shared, shared.kind, fd)
                case _:
                    raise NotShareable(f"a rank on a GPU cannot map memory of kind {shared.kind}")
        except DriverRefused as error:
            raise NotShareable(
                f"the peer's memory ({shared.kind}) cannot be mapped: {error}"
            ) from error

    def _export_plain(self, start: int, num_bytes: int) -> Export:
        try:
            base, allocation_bytes = self._driver.allocation_of(start)
            handle = self._driver.ipc_handle(base)
        except DriverRefused as error:
            raise NotShareable(
                f"the KV cache has no handle for peers (expandable_segments?): {error}"
            ) from error
        return Export(SharedRange("cuda_ipc", allocation_bytes, start - base, num_bytes, handle))

    def _open_ipc(self, shared: SharedRange) -> PeerMapping:
        """Map a peer's cudaMalloc allocation. CUDA does not define what an owner's death does."""
        driver = self._driver
        start = driver.open_ipc(shared.handle)
        return PeerMapping(
            start + shared.offset_bytes, shared.num_bytes, lambda: driver.close_ipc(start)
        )

    def _import(self, shared: SharedRange, kind: HandleKind, handle: int | bytes) -> PeerMapping:
        """Map a peer's CuMem allocation. Raises DriverRefused; then nothing is mapped."""
        driver, size = self._driver, shared.allocation_bytes
        with contextlib.ExitStack() as undo:
            imported = driver.import_handle(kind, handle)
            # Release the handle in any case, because a mapping keeps the memory.
            with contextlib.ExitStack() as release:
                release.callback(driver.release, imported)
                start = driver.reserve(size)
                undo.callback(driver.free_address, start, size)
                driver.map(start, size, imported)
            undo.callback(driver.unmap, start, size)
            driver.set_access(start, size)
            # ``close`` unmaps the memory, then frees the address range.
            close = undo.pop_all().close
        return PeerMapping(start + shared.offset_bytes, shared.num_bytes, close)

    @cached_property
    def _driver(self) -> CudaMemoryDriver:
        try:
            return self.new_driver(self.device.index or 0)
        except ConfigError as error:
            raise NotShareable(
                "the package cuda-bindings is not installed: pip install 'pdlaunch[cuda]'"
            ) from error
        except DriverRefused as error:
            raise NotShareable(str(error)) from error
