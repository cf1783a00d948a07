"""A driver whose device is a dictionary: checks every call's order, holds bytes, and fails when
told to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pdlaunch.engine.memory.driver import DriverRefused, Handle, HandleKind, OutOfDeviceMemory


@dataclass(eq=False)
class Physical:
    content: bytearray
    exported: int = 0


@dataclass(eq=False)
class Host:
    content: bytearray


@dataclass
class Range:
    num_bytes: int
    physical: Physical | None = None
    accessible: bool = False


@dataclass
class FakeDriver:
    page_bytes: int = 8
    handle_kind: HandleKind = "posix_fd"
    device_bytes: int = 1 << 20
    failing: str = ""
    """Method that is refused from its call number ``fails_at`` on."""
    fails_at: int = 0
    ranges: dict[int, Range] = field(default_factory=dict)
    physical: list[Physical] = field(default_factory=list)
    hosts: list[Host] = field(default_factory=list)
    next_address: int = 4096
    num_calls: int = 0
    queued: int = 0

    def fail(self, method: str, at: int = 0) -> None:
        self.failing, self.fails_at, self.num_calls = method, at, 0

    def work(self) -> None:
        self.failing = ""

    @property
    def used_bytes(self) -> int:
        return sum(len(physical.content) for physical in self.physical)

    def reserve(self, num_bytes: int) -> int:
        self._call("reserve")
        assert num_bytes > 0
        assert num_bytes % self.page_bytes == 0
        address, self.next_address = self.next_address, self.next_address + num_bytes
        self.ranges[address] = Range(num_bytes)
        return address

    def free_address(self, address: int, num_bytes: int) -> None:
        found = self.ranges.pop(address)
        assert found.num_bytes == num_bytes
        assert found.physical is None, "freed addresses that are mapped"

    def create(self, num_bytes: int) -> Handle:
        self._call("create")
        if self.used_bytes + num_bytes > self.device_bytes:
            raise OutOfDeviceMemory("cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY")
        physical = Physical(bytearray(b"\xee" * num_bytes))
        self.physical.append(physical)
        return Handle(physical)

    def release(self, handle: Handle) -> None:
        assert not any(found.physical is handle for found in self.ranges.values()), (
            "released while mapped"
        )
        self.physical.remove(handle)  # type: ignore[arg-type]

    def map(self, address: int, num_bytes: int, handle: Handle) -> None:
        self._call("map")
        found = self.ranges[address]
        assert found.physical is None
        assert found.num_bytes == num_bytes == len(handle.content)  # type: ignore[attr-defined]
        found.physical = handle  # type: ignore[assignment]

    def set_access(self, address: int, num_bytes: int) -> None:
        self._call("set_access")
        assert self.ranges[address].num_bytes == num_bytes
        self.ranges[address].accessible = True

    def unmap(self, address: int, num_bytes: int) -> None:
        assert not self.queued, "unmapped under a copy that is queued"
        found = self.ranges[address]
        assert found.physical is not None
        assert found.num_bytes == num_bytes
        found.physical, found.accessible = None, False

    def export(self, handle: Handle) -> int | bytes:
        self._call("export")
        number = self.physical.index(handle)  # type: ignore[arg-type]
        return number if self.handle_kind == "posix_fd" else number.to_bytes(64, "little")

    def synchronize(self) -> None:
        self.queued = 0  # also when it reports an error: the work has ended with it
        self._call("synchronize")

    def allocate_host(self, num_bytes: int) -> Host:
        self._call("allocate_host")
        host = Host(bytearray(num_bytes))
        self.hosts.append(host)
        return host

    def free_host(self, buffer: Host) -> None:
        assert not self.queued, "freed under a copy that is queued"
        self.hosts.remove(buffer)

    def copy_to_host(self, buffer: Host, address: int, num_bytes: int) -> None:
        self._call("copy_to_host")
        buffer.content[:] = self.memory(address)[:num_bytes]
        self.queued += 1

    def copy_to_device(self, address: int, buffer: Host, num_bytes: int) -> None:
        self._call("copy_to_device")
        self.memory(address)[:num_bytes] = buffer.content
        self.queued += 1

    def memory(self, address: int) -> bytearray:
        found = self.ranges[address]
        assert found.accessible, "no access"
        assert found.physical is not None, "a fault: nothing is mapped"
        return found.physical.content

    def _call(self, method: str) -> None:
        if method == self.failing:
            self.num_calls += 1
            if self.num_calls > self.fails_at:
                raise DriverRefused(f"{method}: CUDA_ERROR_UNKNOWN")
