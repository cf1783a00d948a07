"""What is told to ``cuda.bindings``, in its own words; a stand-in answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pdlaunch.engine.memory.driver import CudaMemoryDriver, DriverRefused

FABRIC = bytes(range(64))


class FabricHandle:
    """Lives at an address that is good for as long as it does."""

    alive: set[int] = set()
    data = b""

    def __init__(self) -> None:
        self.alive.add(id(self))

    def __del__(self) -> None:
        self.alive.discard(id(self))

    def getPtr(self) -> int:
        return id(self)


class Names:
    """An enumeration: each of its names stands for itself."""

    def __getattr__(self, name: str) -> str:
        return name


class Bindings:
    """The few names of ``cuda.bindings.driver`` that are used; every function returns a code and
    its results.
    """

    CUresult = CUmemLocationType = CUmemAllocationType = CUmemAllocationHandleType = Names()
    CUmemAllocationGranularity_flags = CUdevice_attribute = Names()
    CUmemLocation = CUipcMemHandle = SimpleNamespace
    CUmemFabricHandle = FabricHandle

    def __init__(self, **results: Any) -> None:
        """``results``: of the functions that the test calls."""
        self.results = {
            "cuDeviceGet": (0,),
            "cuDeviceGetAttribute": (0,),
            "cuMemGetAllocationGranularity": (2 << 20,),
        } | results
        self.calls: list[tuple[Any, ...]] = []

    def CUmemAllocationProp(self) -> Any:
        return SimpleNamespace(allocFlags=SimpleNamespace())

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name == "cuMemImportFromShareableHandle" and "FABRIC" in arguments[1]:
                assert arguments[0] in FabricHandle.alive, (
                    "the handle was freed before the driver has read it"
                )
            found = self.results[name]
            return (found,) if isinstance(found, SimpleNamespace) else ("CUDA_SUCCESS", *found)

        return call

    @property
    def properties(self) -> Any:
        """Those that the size of a page was asked for last: of all memory from then on."""
        calls = [call for call in self.calls if call[0] == "cuMemGetAllocationGranularity"]
        return calls[-1][1]


def test_memory_of_peers_is_opened_by_ipc_handles_with_peer_access() -> None:
    bindings = Bindings(
        cuMemGetAddressRange=(4096, 100),
        cuIpcGetMemHandle=(SimpleNamespace(reserved=FABRIC),),
        cuIpcOpenMemHandle=(8192,),
        cuIpcCloseMemHandle=(),
    )
    driver = CudaMemoryDriver(0, bindings)
    assert driver.allocation_of(4100) == (4096, 100)
    assert driver.ipc_handle(4096) == FABRIC
    assert bindings.calls[-2:] == [("cuMemGetAddressRange", 4100), ("cuIpcGetMemHandle", 4096)]
    assert driver.open_ipc(FABRIC) == 8192
    name, handle, flags = bindings.calls[-1]
    assert (name, handle.reserved, flags) == ("cuIpcOpenMemHandle", FABRIC, 1)
    driver.close_ipc(8192)
    assert bindings.calls[-1] == ("cuIpcCloseMemHandle", 8192)


def test_handles_are_imported_as_what_they_are() -> None:
    bindings = Bindings(cuMemImportFromShareableHandle=("memory",))
    driver = CudaMemoryDriver(0, bindings)
    assert driver.import_handle("posix_fd", 5) == "memory"
    assert bindings.calls[-1][1:] == (5, "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR")
    assert driver.import_handle("fabric", FABRIC) == "memory"
    assert bindings.calls[-1][2] == "CU_MEM_HANDLE_TYPE_FABRIC"


def test_a_refusal_names_the_call() -> None:
    refusal = SimpleNamespace(name="CUDA_ERROR_PEER_ACCESS_UNSUPPORTED")
    driver = CudaMemoryDriver(0, Bindings(cuIpcOpenMemHandle=refusal))
    with pytest.raises(
        DriverRefused, match="cuIpcOpenMemHandle: CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"
    ):
        driver.open_ipc(FABRIC)


def test_memory_is_for_fabric_handles_and_rdma_where_the_device_has_both() -> None:
    bindings = Bindings(
        cuDeviceGetAttribute=(1,),
        cuMemCreate=("memory",),
        cuMemExportToShareableHandle=(SimpleNamespace(data=FABRIC),),
        cuMemRelease=(),
    )
    driver = CudaMemoryDriver(0, bindings)
    assert bindings.calls[-1] == ("cuMemRelease", "memory")  # of the trial
    assert driver.handle_kind == "fabric"
    assert driver.export(driver.create(2 << 20)) == FABRIC
    (_, num_bytes, properties, _), (_, _, kind, _) = bindings.calls[-2:]
    assert num_bytes == 2 << 20
    assert properties.requestedHandleTypes == kind == "CU_MEM_HANDLE_TYPE_FABRIC"
    assert properties.allocFlags.gpuDirectRDMACapable == 1


@pytest.mark.parametrize(
    ("refused", "num_given_back"), [("cuMemCreate", 0), ("cuMemExportToShareableHandle", 1)]
)
def test_memory_is_for_descriptors_where_fabric_handles_are_not_permitted(
    refused: str, num_given_back: int
) -> None:
    results = {
        "cuMemCreate": ("memory",),
        refused: SimpleNamespace(name="CUDA_ERROR_NOT_PERMITTED"),
    }
    bindings = Bindings(cuDeviceGetAttribute=(1,), cuMemRelease=(), **results)
    assert CudaMemoryDriver(0, bindings).handle_kind == "posix_fd"
    assert bindings.properties.requestedHandleTypes.endswith("FILE_DESCRIPTOR")
    assert bindings.properties.allocFlags.gpuDirectRDMACapable == 1
    assert [call[0] for call in bindings.calls].count("cuMemRelease") == num_given_back


def test_a_device_without_rdma_is_not_asked_for_it() -> None:
    bindings = Bindings()
    assert CudaMemoryDriver(0, bindings).handle_kind == "posix_fd"
    assert not hasattr(bindings.properties.allocFlags, "gpuDirectRDMACapable")
