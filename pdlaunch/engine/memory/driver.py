"""Manages the memory of a CUDA device with ``cuda.bindings``: it allocates physical memory and
address ranges, maps one to the other, and exports memory to other processes.

All sizes are multiples of ``page_bytes``, the driver's granularity. A handle identifies physical
memory; an address range is mapped to at most one handle.

Source: the CUDA driver API's chapters on virtual memory management and on memory (inter-process
communication).
"""

import contextlib
import mmap
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, Literal, NewType

import numpy as np

from pdlaunch.errors import ConfigError

Handle = NewType("Handle", object)  # the driver's handle of physical memory

HandleKind = Literal["fabric", "posix_fd"]


class DriverRefused(Exception):
    """Raised if a call of the driver fails. The text has the call and the driver's error."""


_FOR_THIS_CONTEXT = 0  # flags of cuMemHostRegister: none
_LAZY_ENABLE_PEER_ACCESS = 1  # the only flag of cuIpcOpenMemHandle


class CudaMemoryDriver:
    """Manages the memory of one device, whose primary context must be current in each thread that
    calls a method. Every method may raise DriverRefused. Memory can be exported: as a fabric handle
    if this process may create them (there is an IMEX channel), else as a POSIX file descriptor. It
    supports RDMA if the device does.
    """

    def __init__(self, device_index: int, bindings: Any = None) -> None:
        """Raises ConfigError without cuda.bindings, DriverRefused if a device maps no memory."""
        try:
            self._driver: Any = bindings or import_module("cuda.bindings.driver")
        except ImportError:
            raise ConfigError(
                "enable_cumem_allocator needs the package cuda-bindings, which is not installed",
                field="enable_cumem_allocator",
                value=True,
                fix="pip install 'pdlaunch[cuda]', or switch CuMem allocator and sleep mode off",
            ) from None
        self._device = self._call("cuDeviceGet", device_index)
        self._location = self._driver.CUmemLocation()
        self._location.type = self._driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._location.id = device_index
        self._use("posix_fd")
        if self._attribute("CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED"):
            self._use("fabric")
            # The device supports fabric handles, but this process may not be allowed to create
            # them: try it.
            if not self._can_export_a_page():
                self._use("posix_fd")

    def reserve(self, num_bytes: int) -> int:
        """Reserve an address range, until ``free_address``. No memory is mapped to it yet."""
        return int(self._call("cuMemAddressReserve", num_bytes, 0, 0, 0))

    def free_address(self, address: int, num_bytes: int) -> None:
        self._call("cuMemAddressFree", address, num_bytes)

    def create(self, num_bytes: int) -> Handle:
        """Allocate physical memory, freed when all processes have released and unmapped it."""
        return Handle(self._call("cuMemCreate", num_bytes, self._properties, 0))

    def release(self, handle: Handle) -> None:
        self._call("cuMemRelease", handle)

    def map(self, address: int, num_bytes: int, handle: Handle) -> None:
        self._call("cuMemMap", address, num_bytes, 0, handle, 0)

    def set_access(self, address: int, num_bytes: int) -> None:
        """Let this device read and write the mapped memory, even if it is on another device."""
        access = self._driver.CUmemAccessDesc()
        access.location = self._location
        access.flags = self._driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._call("cuMemSetAccess", address, num_bytes, [access], 1)

    def unmap(self, address: int, num_bytes: int) -> None:
        """Unmap the range. All work that uses it must have ended (see ``synchronize``)."""
        self._call("cuMemUnmap", address, num_bytes)

    def export(self, handle: Handle) -> int | bytes:
        """Return the fabric handle or descriptor for peers. The caller closes the descriptor."""
        exported = self._call(
            "cuMemExportToShareableHandle", handle, self._handle_type(self.handle_kind), 0
        )
        return bytes(exported.data) if self.handle_kind == "fabric" else int(exported)

    def synchronize(self) -> None:
        """Wait for all work queued on the device, copies included."""
        self._call("cuCtxSynchronize")

    def allocate_host(self, num_bytes: int) -> mmap.mmap:
        try:
            memory = map_pages(num_bytes)
        except OSError as error:
            raise DriverRefused(f"mmap of {num_bytes} bytes: {error}") from error
        # Touch pages first: locking takes most of the time of a sleep that keeps the weights.
        touch_pages(memory)
        self._call("cuMemHostRegister", address_of(memory), num_bytes, _FOR_THIS_CONTEXT)
        return memory

    def free_host(self, buffer: mmap.mmap) -> None:
        self._call("cuMemHostUnregister", address_of(buffer))
        buffer.close()

    def copy_to_host(self, buffer: mmap.mmap, address: int, num_bytes: int) -> None:
        """Queue a copy on the default stream; so does ``copy_to_device``."""
        self._call("cuMemcpyDtoHAsync", address_of(buffer), address, num_bytes, 0)

    def copy_to_device(self, address: int, buffer: mmap.mmap, num_bytes: int) -> None:
        self._call("cuMemcpyHtoDAsync", address, address_of(buffer), num_bytes, 0)

    def import_handle(self, kind: HandleKind, handle: int | bytes) -> Handle:
        """Import a peer's physical memory. The caller closes the descriptor."""
        kind_of_driver = self._handle_type(kind)
        if isinstance(handle, int):
            return Handle(self._call("cuMemImportFromShareableHandle", handle, kind_of_driver))
        fabric = self._driver.CUmemFabricHandle()  # must stay alive during the call
        fabric.data = handle
        return Handle(self._call("cuMemImportFromShareableHandle", fabric.getPtr(), kind_of_driver))

    def allocation_of(self, address: int) -> tuple[int, int]:
        """Return start and size of the allocation that contains an address."""
        start, num_bytes = self._call("cuMemGetAddressRange", address)
        return int(start), int(num_bytes)

    def ipc_handle(self, address: int) -> bytes:
        """Return the 64-byte IPC handle of an allocation. The driver refuses CuMem allocations."""
        return bytes(self._call("cuIpcGetMemHandle", address).reserved)

    def open_ipc(self, handle: bytes) -> int:
        """Map a peer's allocation, until ``close_ipc``, and return its address in this process."""
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
        """Let ``create`` allocate memory that can be exported as handles of this kind."""
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
        """Return True if the device has this attribute. An old driver may not know it."""
        attribute = getattr(self._driver.CUdevice_attribute, name)
        try:
            return bool(self._call("cuDeviceGetAttribute", attribute, self._device))
        except DriverRefused:
            return False

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call the driver. Return its result, a tuple of several, or None. Raises DriverRefused."""
        code, *results = getattr(self._driver, name)(*arguments)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise DriverRefused(f"{name}: {code.name}")
        if len(results) > 1:
            return tuple(results)
        return results[0] if results else None


# Several threads touch huge pages before they are page-locked. Otherwise the kernel would provide
# them during locking, on one core. H200's host: about 10 GiB/s; the driver's own allocator of
# page-locked memory: 1.4 to 2.7 GiB/s.
NUM_THREADS = 8
THREAD_BYTES = 8 * 1024**2  # another thread for less memory saves no time

_SMALL_PAGE_BYTES = 4096


def map_pages(num_bytes: int) -> mmap.mmap:
    """Map anonymous memory without providing its pages yet. Raises OSError."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # A kernel without huge pages is only slower.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def touch_pages(memory: mmap.mmap) -> None:
    """Make the kernel provide all pages, by writing 0 to the first byte of each."""
    pages = np.frombuffer(memory, dtype=np.uint8)[::_SMALL_PAGE_BYTES]
    num_parts = min(NUM_THREADS, -(-len(memory) // THREAD_BYTES))
    with ThreadPoolExecutor(num_parts, thread_name_prefix="touch") as pool:
        list(pool.map(lambda part: part.fill(0), np.array_split(pages, num_parts)))


def address_of(memory: mmap.mmap) -> int:
    """Return the address of the first byte, valid while ``memory`` is alive."""
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
