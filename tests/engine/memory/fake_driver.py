"""A driver whose device is a dictionary: checks every call's order, holds bytes, and fails when
told to.
"""

from dataclasses import dataclass, field

from pdlaunch.engine.memory.driver import DriverRefused, Handle, HandleKind


@dataclass(eq=False)
class Memory:
    """Physical memory of the device, or pages of the host."""

    content: bytearray


@dataclass
class Range:
    num_bytes: int
    physical: Memory | None = None
    accessible: bool = False


@dataclass
class FakeDriver:
    page_bytes: int = 8
    handle_kind: HandleKind = "posix_fd"
    device_bytes: int = 1 << 20
    failing: str = ""  # method that is refused from its call number ``fails_at`` on
    fails_at: int = 0
    ranges: dict[int, Range] = field(default_factory=dict)
    handles: list[Memory] = field(default_factory=list)
    hosts: list[Memory] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    next_address: int = 4096
    num_failing_calls: int = 0
    queued: int = 0
    peer_bytes: int = 4096  # of what is imported
    plain: dict[int, int] = field(default_factory=dict)
    """Bytes of allocations that cudaMalloc has made, by address."""
    opened: set[int] = field(default_factory=set)

    def fail(self, method: str, at: int = 0) -> None:
        self.failing, self.fails_at, self.num_failing_calls = method, at, 0

    def work(self) -> None:
        self.failing = ""

    @property
    def used_bytes(self) -> int:
        """Memory lives as long as a handle or a mapping of it."""
        mapped = (found.physical for found in self.ranges.values() if found.physical is not None)
        living = {id(memory): memory for memory in (*self.handles, *mapped)}
        return sum(len(memory.content) for memory in living.values())

    def reserve(self, num_bytes: int) -> int:
        self._call("reserve")
        assert num_bytes > 0
        assert num_bytes % self.page_bytes == 0
        address, self.next_address = self.next_address, self.next_address + num_bytes
        self.ranges[address] = Range(num_bytes)
        return address

    def free_address(self, address: int, num_bytes: int) -> None:
        self._call("free_address")
        found = self.ranges.pop(address)
        assert found.num_bytes == num_bytes
        assert found.physical is None, "freed addresses that are mapped"

    def create(self, num_bytes: int) -> Handle:
        self._call("create")
        if self.used_bytes + num_bytes > self.device_bytes:
            raise DriverRefused("cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY")
        return self._new_handle(num_bytes)

    def import_handle(self, kind: HandleKind, handle: int | bytes) -> Handle:
        self._call("import_handle")
        assert isinstance(handle, int) == (kind == "posix_fd")
        return self._new_handle(self.peer_bytes)

    def release(self, handle: Handle) -> None:
        self._call("release")
        self.handles.remove(handle)  # type: ignore[arg-type]

    def map(self, address: int, num_bytes: int, handle: Handle) -> None:
        self._call("map")
        found = self.ranges[address]
        assert handle in self.handles
        assert found.physical is None
        assert found.num_bytes == num_bytes == len(handle.content)  # type: ignore[attr-defined]
        found.physical = handle  # type: ignore[assignment]

    def set_access(self, address: int, num_bytes: int) -> None:
        self._call("set_access")
        found = self.ranges[address]
        assert found.physical is not None
        assert found.num_bytes == num_bytes
        found.accessible = True

    def unmap(self, address: int, num_bytes: int) -> None:
        self._call("unmap")
        assert not self.queued, "unmapped under a copy that is queued"
        found = self.ranges[address]
        assert found.physical is not None
        assert found.num_bytes == num_bytes
        found.physical, found.accessible = None, False

    def export(self, handle: Handle) -> int | bytes:
        self._call("export")
        number = self.handles.index(handle)  # type: ignore[arg-type]
        return number if self.handle_kind == "posix_fd" else number.to_bytes(64, "little")

    def synchronize(self) -> None:
        self.queued = 0  # also when it reports an error: the work has ended with it
        self._call("synchronize")

    def allocate_host(self, num_bytes: int) -> Memory:
        self._call("allocate_host")
        host = Memory(bytearray(num_bytes))
        self.hosts.append(host)
        return host

    def free_host(self, buffer: Memory) -> None:
        assert not self.queued, "freed under a copy that is queued"
        self.hosts.remove(buffer)

    def copy_to_host(self, buffer: Memory, address: int, num_bytes: int) -> None:
        self._call("copy_to_host")
        buffer.content[:] = self.memory(address)[:num_bytes]
        self.queued += 1

    def copy_to_device(self, address: int, buffer: Memory, num_bytes: int) -> None:
        self._call("copy_to_device")
        self.memory(address)[:num_bytes] = buffer.content
        self.queued += 1

    def allocation_of(self, address: int) -> tuple[int, int]:
        return next(
            (start, size) for start, size in self.plain.items() if start <= address < start + size
        )

    def ipc_handle(self, address: int) -> bytes:
        self._call("ipc_handle")
        assert address in self.plain, "handles are those of whole allocations"
        return address.to_bytes(64, "little")

    def open_ipc(self, handle: bytes) -> int:
        self._call("open_ipc")
        self.opened.add(0x20000)
        return 0x20000

    def close_ipc(self, address: int) -> None:
        self._call("close_ipc")
        self.opened.remove(address)

    def memory(self, address: int) -> bytearray:
        found = self.ranges[address]
        assert found.accessible, "no access"
        assert found.physical is not None, "a fault: nothing is mapped"
        return found.physical.content

    def _new_handle(self, num_bytes: int) -> Handle:
        memory = Memory(bytearray(b"\xee" * num_bytes))
        self.handles.append(memory)
        return Handle(memory)

    def _call(self, method: str) -> None:
        self.calls.append(method)
        if method == self.failing:
            self.num_failing_calls += 1
            if self.num_failing_calls > self.fails_at:
                raise DriverRefused(f"{method}: CUDA_ERROR_UNKNOWN")
