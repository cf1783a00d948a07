"""The pools need three things of a device's driver: physical memory, addresses, and the map between
them.

A page is the driver's granule: sizes are multiples of ``page_bytes``. Physical memory is known by a
handle, address ranges by their start; one range is mapped to at most one handle.
"""

from __future__ import annotations

from typing import Any, Literal, NewType, Protocol

Handle = NewType("Handle", object)
"""Physical memory, as the driver knows it."""

HandleKind = Literal["fabric", "posix_fd"]


class DriverRefused(Exception):
    """The driver has refused a call; the text names the call and the driver's error."""


class OutOfDeviceMemory(DriverRefused):
    """The device has no room for the physical memory asked for."""


class MemoryDriver(Protocol):
    """Drives one device. Every method may raise DriverRefused; addresses and sizes are in bytes."""

    page_bytes: int
    handle_kind: HandleKind
    """The kind of handle that ``export`` returns: an integer file descriptor, or the 64 bytes of a
    fabric handle.
    """

    def reserve(self, num_bytes: int) -> int:
        """Reserve an address range that nothing is mapped to, until ``free_address``."""

    def free_address(self, address: int, num_bytes: int) -> None: ...

    def create(self, num_bytes: int) -> Handle:
        """Create physical memory of the device, which lives until it is released, unmapped, and
        closed by all peers that import it.

        Raises OutOfDeviceMemory.
        """

    def release(self, handle: Handle) -> None: ...

    def map(self, address: int, num_bytes: int, handle: Handle) -> None: ...

    def set_access(self, address: int, num_bytes: int) -> None:
        """Let this device read and write what is mapped there."""

    def unmap(self, address: int, num_bytes: int) -> None:
        """Unmap the range; nothing may use the addresses any more (see ``synchronize``)."""

    def export(self, handle: Handle) -> int | bytes:
        """Return the handle by which a peer imports the memory; the caller closes a descriptor."""

    def synchronize(self) -> None:
        """Wait for everything queued on the device, copies included."""

    def allocate_host(self, num_bytes: int) -> Any:
        """Allocate page-locked host memory."""

    def free_host(self, buffer: Any) -> None: ...

    def copy_to_host(self, buffer: Any, address: int, num_bytes: int) -> None:
        """Queue a copy."""

    def copy_to_device(self, address: int, buffer: Any, num_bytes: int) -> None:
        """Queue a copy."""
