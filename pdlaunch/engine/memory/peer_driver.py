"""Sharing device memory needs a few calls of the driver; here are their interface and the CUDA
driver's implementation.

Source: the CUDA driver API's chapters on virtual memory management and on memory (inter-process
communication).
"""

from __future__ import annotations

from typing import Protocol

from pdlaunch.engine.memory.cuda_memory_driver import CudaMemoryDriver
from pdlaunch.engine.memory.driver import Handle, HandleKind

_LAZY_ENABLE_PEER_ACCESS = 1
"""CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS: the only flag that cuIpcOpenMemHandle takes."""


class PeerDriver(Protocol):
    """Maps memory of others on one device. Every method may raise DriverRefused; addresses and
    sizes are in bytes.
    """

    def import_handle(self, kind: HandleKind, handle: int | bytes) -> Handle:
        """Import physical memory of a peer, until it is released and unmapped; the caller keeps the
        descriptor.
        """

    def reserve(self, num_bytes: int) -> int: ...

    def free_address(self, address: int, num_bytes: int) -> None: ...

    def map(self, address: int, num_bytes: int, handle: Handle) -> None: ...

    def release(self, handle: Handle) -> None:
        """Release the handle; mappings of it stay."""

    def set_access(self, address: int, num_bytes: int) -> None:
        """Let this device use what is mapped there, wherever it lies."""

    def unmap(self, address: int, num_bytes: int) -> None: ...

    def allocation_of(self, address: int) -> tuple[int, int]:
        """Return start and size of the allocation that holds an address."""

    def ipc_handle(self, address: int) -> bytes:
        """Return the 64-byte handle of the allocation that starts at ``address``; refused where it
        was mapped rather than allocated.
        """

    def open_ipc(self, handle: bytes) -> int:
        """Open a peer's allocation and return its start in this process; each call needs one
        ``close_ipc``.
        """

    def close_ipc(self, address: int) -> None: ...


class CudaPeerDriver(CudaMemoryDriver):
    """Calls ``cuda.bindings``; the device's primary context must be current in every thread that
    calls.
    """

    def import_handle(self, kind: HandleKind, handle: int | bytes) -> Handle:
        kind_of_driver = self._handle_type(kind)
        if isinstance(handle, int):
            return Handle(self._call("cuMemImportFromShareableHandle", handle, kind_of_driver))
        fabric = self._driver.CUmemFabricHandle()  # must outlive the call, which gets its address
        fabric.data = handle
        return Handle(self._call("cuMemImportFromShareableHandle", fabric.getPtr(), kind_of_driver))

    def allocation_of(self, address: int) -> tuple[int, int]:
        start, num_bytes = self._call("cuMemGetAddressRange", address)
        return int(start), int(num_bytes)

    def ipc_handle(self, address: int) -> bytes:
        return bytes(self._call("cuIpcGetMemHandle", address).reserved)

    def open_ipc(self, handle: bytes) -> int:
        opened = self._driver.CUipcMemHandle()
        opened.reserved = handle
        return int(self._call("cuIpcOpenMemHandle", opened, _LAZY_ENABLE_PEER_ACCESS))

    def close_ipc(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", address)
