"""Drives the memory of a CUDA device with ``cuda.bindings``: physical memory, addresses, the map
between them, and handles by which other processes import memory.

A page is the driver's granule: sizes are multiples of ``page_bytes``. Physical memory is known by a
handle, address ranges by their start; one range is mapped to at most one handle.

Source: the CUDA driver API's chapters on virtual memory management and on memory (inter-process
communication).
"""

from __future__ import annotations

import contextlib
import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NewType

import numpy as np

from pdlaunch.errors import ConfigError

Handle = NewType("Handle", object)  # physical memory, as the driver knows it

HandleKind = Literal["fabric", "posix_fd"]


class DriverRefused(Exception):
    """The driver has refused a call; the text names the call and the driver's error."""


_FOR_THIS_CONTEXT = 0  # no flag of cuMemHostRegister
_LAZY_ENABLE_PEER_ACCESS = 1  # the only flag that cuIpcOpenMemHandle takes


class CudaMemoryDriver:
    """Drives one device, whose primary context is current in every thread that calls. Every method
    may raise DriverRefused; addresses and sizes are in bytes.

    Memory is made for RDMA where the device can do that, and can be exported: as fabric handle
    where this process may make them (an IMEX channel is there), else as POSIX file descriptor.
    """

    def __init__(self, device_index: int, bindings: Any = None) -> None:
        """``bindings``: None for ``cuda.bindings.driver``.

        Raises ConfigError without cuda.bindings, DriverRefused when the device cannot map memory.
        """
        self._driver: Any = bindings or _import_bindings()
        self._device = self._call("cuDeviceGet", device_index)
        self._location = self._driver.CUmemLocation()
        self._location.type = self._driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._location.id = device_index
        self._use("posix_fd")
        if self._attribute("CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED"):
            self._use("fabric")
            # That the device knows fabric handles is not enough: a page of memory tells whether
            # this process may make them.
            if not self._can_export_a_page():
                self._use("posix_fd")

    def reserve(self, num_bytes: int) -> int:
        """Reserve an address range that nothing is mapped to, until ``free_address``."""
        return int(self._call("cuMemAddressReserve", num_bytes, 0, 0, 0))

    def free_address(self, address: int, num_bytes: int) -> None:
        self._call("cuMemAddressFree", address, num_bytes)

    def create(self, num_bytes: int) -> Handle:
        """Create physical memory; it lives until it is released, unmapped, and closed by peers."""
        return Handle(self._call("cuMemCreate", num_bytes, self._properties, 0))

    def release(self, handle: Handle) -> None:
        self._call("cuMemRelease", handle)

    def map(self, address: int, num_bytes: int, handle: Handle) -> None:
        self._call("cuMemMap", address, num_bytes, 0, handle, 0)

    def set_access(self, address: int, num_bytes: int) -> None:
        """Let this device read and write what is mapped there, wherever it lies."""
        access = self._driver.CUmemAccessDesc()
        access.location = self._location
        access.flags = self._driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._call("cuMemSetAccess", address, num_bytes, [access], 1)

    def unmap(self, address: int, num_bytes: int) -> None:
        """Unmap the range; nothing may use it any more (see ``synchronize``)."""
        self._call("cuMemUnmap", address, num_bytes)

    def export(self, handle: Handle) -> int | bytes:
        """Return the handle by which a peer imports the memory; the caller closes a descriptor."""
        exported = self._call(
            "cuMemExportToShareableHandle", handle, self._handle_type(self.handle_kind), 0
        )
        return bytes(exported.data) if self.handle_kind == "fabric" else int(exported)

    def synchronize(self) -> None:
        """Wait for everything queued on the device, copies included."""
        self._call("cuCtxSynchronize")

    def allocate_host(self, num_bytes: int) -> mmap.mmap:
        """Allocate page-locked host memory."""
        try:
            memory = map_pages(num_bytes)
        except OSError as error:
            raise DriverRefused(f"mmap of {num_bytes} bytes: {error}") from error
        # Before the driver locks them, which is most of the time of a sleep that keeps the weights.
        touch_pages(memory)
        self._call("cuMemHostRegister", address_of(memory), num_bytes, _FOR_THIS_CONTEXT)
        return memory

    def free_host(self, buffer: mmap.mmap) -> None:
        self._call("cuMemHostUnregister", address_of(buffer))
        buffer.close()

    def copy_to_host(self, buffer: mmap.mmap, address: int, num_bytes: int) -> None:
        """Queue a copy, as ``copy_to_device`` does."""
        self._call("cuMemcpyDtoHAsync", address_of(buffer), address, num_bytes, 0)

    def copy_to_device(self, address: int, buffer: mmap.mmap, num_bytes: int) -> None:
        self._call("cuMemcpyHtoDAsync", address, address_of(buffer), num_bytes, 0)

    def import_handle(self, kind: HandleKind, handle: int | bytes) -> Handle:
        """Import a peer's physical memory; the caller keeps the descriptor."""
        kind_of_driver = self._handle_type(kind)
        if isinstance(handle, int):
            return Handle(self._call("cuMemImportFromShareableHandle", handle, kind_of_driver))
        fabric = self._driver.CUmemFabricHandle()  # must outlive the call, which gets its address
        fabric.data = handle
        return Handle(self._call("cuMemImportFromShareableHandle", fabric.getPtr(), kind_of_driver))

    def allocation_of(self, address: int) -> tuple[int, int]:
        """Return start and size of the allocation that holds an address."""
        start, num_bytes = self._call("cuMemGetAddressRange", address)
        return int(start), int(num_bytes)

    def ipc_handle(self, address: int) -> bytes:
        """Return the 64-byte handle of an allocation. The driver refuses mapped memory."""
        return bytes(self._call("cuIpcGetMemHandle", address).reserved)

    def open_ipc(self, handle: bytes) -> int:
        """Open a peer's allocation and return its start in this process, until ``close_ipc``."""
        opened = self._driver.CUipcMemHandle()
        opened.reserved = handle
        return int(self._call("cuIpcOpenMemHandle", opened, _LAZY_ENABLE_PEER_ACCESS))

    def close_ipc(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", address)

    def _can_export_a_page(self) -> bool:
        try:
            handle = self.create(self.page_bytes)
            try:
                self.export(handle)
            finally:
                self.release(handle)
        except DriverRefused:
            return False
        return True

    def _use(self, kind: HandleKind) -> None:
        """Make all memory from now on for handles of this kind."""
        properties = self._driver.CUmemAllocationProp()
        properties.type = self._driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location = self._location
        properties.requestedHandleTypes = self._handle_type(kind)
        if self._attribute("CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED"):
            properties.allocFlags.gpuDirectRDMACapable = 1
        flag = self._driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.handle_kind: HandleKind = kind
        self._properties: Any = properties
        self.page_bytes = int(self._call("cuMemGetAllocationGranularity", properties, flag))

    def _handle_type(self, kind: HandleKind) -> Any:
        kinds = self._driver.CUmemAllocationHandleType
        return (
            kinds.CU_MEM_HANDLE_TYPE_FABRIC
            if kind == "fabric"
            else kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        )

    def _attribute(self, name: str) -> bool:
        """Return whether the device has this attribute; an old driver does not know it."""
        attribute = getattr(self._driver.CUdevice_attribute, name)
        try:
            return bool(self._call("cuDeviceGetAttribute", attribute, self._device))
        except DriverRefused:
            return False

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call the driver and return its results: none, one, or a tuple. Raises DriverRefused."""
        code, *results = getattr(self._driver, name)(*arguments)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise DriverRefused(f"{name}: {code.name}")
        if len(results) > 1:
            return tuple(results)
        return results[0] if results else None


# Memory to be page-locked lies in huge pages, which several threads touch first: locking makes the
# kernel provide pages one after another, on one core, 1.4 to 2.7 GiB/s on an H200's host for memory
# of the driver's own allocator, about 10 GiB/s for memory from here.
NUM_THREADS = 8
THREAD_BYTES = 8 * 1024**2  # bytes below which another thread does not pay

_SMALL_PAGE_BYTES = 4096


def map_pages(num_bytes: int) -> mmap.mmap:
    """Map anonymous memory whose pages are not there yet. Raises OSError."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # A kernel without huge pages: only slower.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def touch_pages(memory: mmap.mmap) -> None:
    """Make the kernel provide all pages. The first byte of each is set to 0."""
    pages = np.frombuffer(memory, dtype=np.uint8)[::_SMALL_PAGE_BYTES]
    num_parts = min(NUM_THREADS, -(-len(memory) // THREAD_BYTES))
    with ThreadPoolExecutor(num_parts, thread_name_prefix="touch") as pool:
        list(pool.map(lambda part: part.fill(0), np.array_split(pages, num_parts)))


def address_of(memory: mmap.mmap) -> int:
    """Return the address of the first byte; it is valid while ``memory`` lives."""
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)


def _import_bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise ConfigError(
            "enable_cumem_allocator needs the package cuda-bindings, which is not installed",
            field="enable_cumem_allocator",
            value=True,
            fix="pip install 'pdlaunch[cuda]', or switch the CuMem allocator and sleep mode off",
        ) from None
    return driver
