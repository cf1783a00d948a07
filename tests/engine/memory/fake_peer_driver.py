"""A driver that writes down what it is told, keeps count of what is held, and refuses what the test
says.
"""

from __future__ import annotations

from pdlaunch.engine.memory.driver import DriverRefused, Handle, HandleKind


class FakePeerDriver:
    def __init__(self, refuses: str = "") -> None:
        """``refuses``: a method that fails."""
        self.refuses = refuses
        self.calls: list[str] = []
        self.held: set[str] = set()
        """What is imported, reserved, mapped and opened now."""
        self.allocations = {0x7000: 4096}

    def import_handle(self, kind: HandleKind, handle: int | bytes) -> Handle:
        self._call("import_handle")
        self.held.add("handle")
        return Handle((kind, handle))

    def reserve(self, num_bytes: int) -> int:
        self._call("reserve")
        self.held.add("addresses")
        return 0x10000

    def free_address(self, address: int, num_bytes: int) -> None:
        assert "mapping" not in self.held, "addresses are freed under a mapping"
        self._call("free_address")
        self.held.remove("addresses")

    def map(self, address: int, num_bytes: int, handle: Handle) -> None:
        assert {"handle", "addresses"} <= self.held
        self._call("map")
        self.held.add("mapping")

    def release(self, handle: Handle) -> None:
        self._call("release")
        self.held.remove("handle")

    def set_access(self, address: int, num_bytes: int) -> None:
        assert "mapping" in self.held
        self._call("set_access")

    def unmap(self, address: int, num_bytes: int) -> None:
        self._call("unmap")
        self.held.remove("mapping")

    def allocation_of(self, address: int) -> tuple[int, int]:
        self._call("allocation_of")
        return next(
            (start, size)
            for start, size in self.allocations.items()
            if start <= address < start + size
        )

    def ipc_handle(self, address: int) -> bytes:
        self._call("ipc_handle")
        assert address in self.allocations, "handles are those of whole allocations"
        return address.to_bytes(64, "little")

    def open_ipc(self, handle: bytes) -> int:
        self._call("open_ipc")
        self.held.add("ipc")
        return 0x20000

    def close_ipc(self, address: int) -> None:
        assert address == 0x20000, "closed is what was opened, not the tensor in it"
        self._call("close_ipc")
        self.held.remove("ipc")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.refuses:
            raise DriverRefused(f"{name}: CUDA_ERROR_INVALID_VALUE")
