"""Allocates the KV memory of a rank on a GPU: from a CuMem pool if there is one, else from torch's
own allocator.

CuMem allocations are exported by CuMem handles; torch's cudaMalloc allocations by CUDA IPC handles.
Torch's expandable segments cannot be exported, so they are off in pools, and for memory that peers
must map.
"""

import contextlib
from collections.abc import Callable
from functools import cached_property

import torch

from pdlaunch.engine.memory.driver import CudaMemoryDriver, DriverRefused, HandleKind
from pdlaunch.engine.memory.kv_memory import (
    Export,
    HostKVMemory,
    KVMemory,
    NotShareable,
    PeerMapping,
    PrivateKVMemory,
    SharedRange,
)
from pdlaunch.engine.memory.pools import KV_CACHE, MemoryPools, expandable_segments_off
from pdlaunch.errors import ConfigError, MemoryPoolError


def open_kv_memory(
    pools: MemoryPools, device: torch.device, *, shared: bool, mapped_alone: bool = False
) -> KVMemory:
    """Return the KV memory for a device. ``shared``: peers may map it. ``mapped_alone``: peers can
    only map it, so expandable segments are off for it on a GPU; PD204 refuses them for the others.
    """
    if device.type == "cpu":
        return HostKVMemory() if shared else PrivateKVMemory()
    return DeviceKVMemory(pools, device, mapped_alone=mapped_alone)


class DeviceKVMemory(KVMemory):
    """Allocates on one device. Only the thread that owns the pools may call ``zeros``; any thread
    with the device's current context may call the other methods.
    """

    def __init__(
        self,
        pools: MemoryPools,
        device: torch.device,
        new_driver: Callable[[int], CudaMemoryDriver] = CudaMemoryDriver,
        *,
        mapped_alone: bool = False,
    ) -> None:
        """``new_driver`` takes the device index. It is called at the first export or map."""
        self._pools = pools
        self._device = device
        self._new_driver = new_driver
        self._mapped_alone = mapped_alone

    def zeros(self, num_bytes: int) -> torch.Tensor:
        segments = expandable_segments_off() if self._mapped_alone else contextlib.nullcontext()
        with segments, self._pools.memory_pool(KV_CACHE):
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)

    def export(self, tensor: torch.Tensor) -> Export:
        assert tensor.is_contiguous()
        start, num_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        try:
            export = self._pools.export(start, num_bytes) or self._export_plain(start, num_bytes)
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
            return self._new_driver(self._device.index or 0)
        except ConfigError as error:
            raise NotShareable(
                "the package cuda-bindings is not installed: pip install 'pdlaunch[cuda]'"
            ) from error
        except DriverRefused as error:
            raise NotShareable(str(error)) from error
