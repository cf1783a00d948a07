"""Allocates the KV memory of a rank on a GPU: from a CuMem pool when there is one, else from
torch's own allocator.

CuMem allocations are shared by their own handles, as they are mapped piece by piece; what torch has
allocated with cudaMalloc by the handles of CUDA IPC. A tensor lies in one allocation, as expandable
segments are off in pools, and for what peers can only map; elsewhere they cannot be shared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from pdlaunch.engine.memory.allocations import ExportedHandle
from pdlaunch.engine.memory.driver import CudaMemoryDriver, DriverRefused
from pdlaunch.engine.memory.kv_memory import (
    Export,
    HostKVMemory,
    KVMemory,
    NotShareable,
    PeerMapping,
    PrivateKVMemory,
    SharedRange,
)
from pdlaunch.engine.memory.pools import (
    KV_CACHE,
    MemoryPools,
    TorchAllocatorSettings,
    expandable_segments_off,
)
from pdlaunch.errors import ConfigError, MemoryPoolError


class DeviceKVMemory(KVMemory):
    """Allocates on one device. ``zeros`` is for the thread that owns the pools; the others are for
    any thread in which the device's context is current.
    """

    def __init__(
        self,
        pools: MemoryPools,
        device: torch.device,
        new_driver: Callable[[int], CudaMemoryDriver] = CudaMemoryDriver,
        *,
        allocator: TorchAllocatorSettings | None = None,
    ) -> None:
        """``new_driver``: from the index of the device; called when memory is first shared.
        ``allocator``: switches expandable segments off for what is allocated here; None leaves them
        as they are.
        """
        self._pools = pools
        self._device = device
        self._allocator = allocator
        self._new_driver = new_driver
        self._opened: CudaMemoryDriver | None = None

    def zeros(self, num_bytes: int) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            if self._allocator is not None:
                stack.enter_context(expandable_segments_off(self._allocator))
            stack.enter_context(self._pools.memory_pool(KV_CACHE))
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)

    def export(self, tensor: torch.Tensor) -> Export:
        assert tensor.is_contiguous()
        start, num_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        try:
            pooled = self._pools.exported_handle(start)
        except MemoryPoolError as error:
            raise NotShareable(str(error)) from error
        export = (
            self._export_plain(start, num_bytes)
            if pooled is None
            else _export_pooled(pooled, start, num_bytes)
        )
        try:
            export.range.check()
        except NotShareable:
            export.close()
            raise
        return export

    def map(self, shared: SharedRange, fd: int | None) -> PeerMapping:
        shared.check()
        driver = self._driver()
        try:
            match shared.kind:
                case "cuda_ipc":
                    return IpcMapping(driver, shared)
                case "fabric":
                    return HandleMapping(driver, shared, shared.handle)
                case "posix_fd" if fd is not None:
                    return HandleMapping(driver, shared, fd)
                case _:
                    raise NotShareable(f"a rank on a GPU cannot map memory of kind {shared.kind}")
        except DriverRefused as error:
            raise NotShareable(
                f"the peer's memory ({shared.kind}) cannot be mapped: {error}"
            ) from error

    def _export_plain(self, start: int, num_bytes: int) -> Export:
        driver = self._driver()
        try:
            base, allocation_bytes = driver.allocation_of(start)
            handle = driver.ipc_handle(base)
        except DriverRefused as error:
            raise NotShareable(
                f"the KV cache has no handle for peers (expandable_segments?): {error}"
            ) from error
        return Export(SharedRange("cuda_ipc", allocation_bytes, start - base, num_bytes, handle))

    def _driver(self) -> CudaMemoryDriver:
        if self._opened is None:
            try:
                self._opened = self._new_driver(self._device.index or 0)
            except ConfigError as error:
                raise NotShareable(
                    "the package cuda-bindings is not installed: pip install 'pdlaunch[cuda]'"
                ) from error
            except DriverRefused as error:
                raise NotShareable(str(error)) from error
        return self._opened


class HandleMapping(PeerMapping):
    """Maps a peer's CuMem allocation, imported by its handle; the mapping alone keeps the
    memory.
    """

    def __init__(self, driver: CudaMemoryDriver, shared: SharedRange, handle: int | bytes) -> None:
        """``shared``: posix_fd or fabric. Raises DriverRefused; then nothing is held."""
        assert shared.kind in ("posix_fd", "fabric")
        self._driver, self._allocation_bytes = driver, shared.allocation_bytes
        with contextlib.ExitStack() as undo:
            imported = driver.import_handle(shared.kind, handle)
            with contextlib.ExitStack() as release:
                release.callback(driver.release, imported)
                self._start = driver.reserve(shared.allocation_bytes)
                undo.callback(driver.free_address, self._start, shared.allocation_bytes)
                driver.map(self._start, shared.allocation_bytes, imported)
            undo.callback(driver.unmap, self._start, shared.allocation_bytes)
            driver.set_access(self._start, shared.allocation_bytes)
            undo.pop_all()
        self.address = self._start + shared.offset_bytes
        self.num_bytes = shared.num_bytes

    def close(self) -> None:
        self._driver.unmap(self._start, self._allocation_bytes)
        self._driver.free_address(self._start, self._allocation_bytes)


class IpcMapping(PeerMapping):
    """Maps a peer's cudaMalloc allocation. CUDA leaves open what becomes of it when its owner
    dies.
    """

    def __init__(self, driver: CudaMemoryDriver, shared: SharedRange) -> None:
        """``shared``: cuda_ipc. Raises DriverRefused."""
        self._driver = driver
        self._start = driver.open_ipc(shared.handle)
        self.address = self._start + shared.offset_bytes
        self.num_bytes = shared.num_bytes

    def close(self) -> None:
        self._driver.close_ipc(self._start)


def _export_pooled(found: ExportedHandle, start: int, num_bytes: int) -> Export:
    offset = start - found.address
    if isinstance(found.handle, int):
        return Export(SharedRange("posix_fd", found.num_bytes, offset, num_bytes), found.handle)
    return Export(SharedRange("fabric", found.num_bytes, offset, num_bytes, found.handle))


def open_kv_memory(
    pools: MemoryPools, device: torch.device, *, shared: bool, mapped_alone: bool = False
) -> KVMemory:
    """Return the KV memory that fits the device. With ``shared`` peers may map it.

    ``mapped_alone``: peers have no other way to it, so on a GPU it lies outside torch's expandable
    segments, which cannot be mapped; where a library may read it too, they are refused (PD204).
    """
    if device.type == "cpu":
        return HostKVMemory() if shared else PrivateKVMemory()
    allocator = TorchAllocatorSettings() if mapped_alone else None
    return DeviceKVMemory(pools, device, allocator=allocator)
