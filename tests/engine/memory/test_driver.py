"""What is told to ``cuda.bindings``, in its own words; a stand-in answers."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from pdlaunch.engine.memory.driver import CudaMemoryDriver

FABRIC = bytes(range(64))


class FabricHandle:
    def getPtr(self) -> Any:
        return weakref.ref(self)


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

    def __init__(self, *, has_fabric_and_rdma: bool = False, **results: Any) -> None:
        """``results``: of other functions; one that is refused has a code."""
        self.results = {
            "cuDeviceGet": (0,),
            "cuDeviceGetAttribute": (int(has_fabric_and_rdma),),
            "cuMemGetAllocationGranularity": (2 << 20,),
            "cuMemCreate": ("memory",),
            "cuMemExportToShareableHandle": (SimpleNamespace(data=FABRIC),),
            "cuMemRelease": (),
        } | results
        self.calls: list[tuple[Any, ...]] = []

    def CUmemAllocationProp(self) -> Any:
        return SimpleNamespace(allocFlags=SimpleNamespace())

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name == "cuMemImportFromShareableHandle" and "FABRIC" in arguments[1]:
                assert arguments[0](), "the handle was freed before the driver has read it"
            found = self.results[name]
            return (found,) if isinstance(found, SimpleNamespace) else ("CUDA_SUCCESS", *found)

        return call


def test_handles_are_opened_and_imported_as_what_they_are() -> None:
    bindings = Bindings(cuMemImportFromShareableHandle=("memory",), cuIpcOpenMemHandle=(8192,))
    driver = CudaMemoryDriver(0, bindings)
    assert driver.import_handle("posix_fd", 5) == "memory"
    assert bindings.calls[-1][1:] == (5, "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR")
    assert driver.import_handle("fabric", FABRIC) == "memory"
    assert bindings.calls[-1][2] == "CU_MEM_HANDLE_TYPE_FABRIC"
    assert driver.open_ipc(FABRIC) == 8192
    name, handle, flags = bindings.calls[-1]
    assert (name, handle.reserved, flags) == ("cuIpcOpenMemHandle", FABRIC, 1)


@pytest.mark.parametrize(
    ("has_both", "refused", "kind", "num_trials"),
    [
        (True, None, "fabric", 1),
        (True, "cuMemCreate", "posix_fd", 0),
        (True, "cuMemExportToShareableHandle", "posix_fd", 1),
        (False, None, "posix_fd", 0),
    ],
)
def test_memory_is_for_fabric_handles_and_rdma_where_both_are_permitted(
    has_both: bool, refused: str | None, kind: str, num_trials: int
) -> None:
    refusal = {refused: SimpleNamespace(name="CUDA_ERROR_NOT_PERMITTED")} if refused else {}
    bindings = Bindings(has_fabric_and_rdma=has_both, **refusal)
    assert CudaMemoryDriver(0, bindings).handle_kind == kind
    assert [name for name, *_ in bindings.calls].count("cuMemRelease") == num_trials
    sizes = [call for call in bindings.calls if call[0] == "cuMemGetAllocationGranularity"]
    properties = sizes[-1][1]  # of all memory from then on
    assert kind.split("_")[0].upper() in properties.requestedHandleTypes
    assert hasattr(properties.allocFlags, "gpuDirectRDMACapable") == has_both
