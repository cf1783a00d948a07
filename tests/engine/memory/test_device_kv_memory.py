"""The order of driver calls, with a driver and pools that only pretend; tensors are on the CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.memory.allocations import ExportedHandle
from pdlaunch.engine.memory.device_kv_memory import DeviceKVMemory
from pdlaunch.engine.memory.driver import CudaMemoryDriver, DriverRefused
from pdlaunch.engine.memory.kv_memory import NotShareable, SharedRange
from pdlaunch.engine.memory.pools import NoMemoryPools
from pdlaunch.errors import ConfigError, MemoryPoolError
from tests.engine.memory.fake_peer_driver import FakePeerDriver
from tests.engine.memory.open_files import num_open_fds
from tests.engine.memory.test_allocator_settings import FakeSettings

FABRIC = bytes(range(64))
DEVICE = torch.device("cuda", 1)


class FakePools(NoMemoryPools):
    """CuMem pools whose one allocation begins 64 bytes before the tensor."""

    def __init__(self, handle: Callable[[], int | bytes], num_bytes: int = 1 << 20) -> None:
        self._handle = handle
        self._num_bytes = num_bytes

    def exported_handle(self, address: int) -> ExportedHandle | None:
        handle = self._handle()
        kind = "posix_fd" if isinstance(handle, int) else "fabric"
        return ExportedHandle("kv_cache", address - 64, self._num_bytes, kind, handle)


def memory_with(driver: FakePeerDriver) -> DeviceKVMemory:
    return DeviceKVMemory(NoMemoryPools(), DEVICE, lambda index: driver)


def test_what_peers_only_map_lies_outside_expandable_segments() -> None:
    class Watched(NoMemoryPools):
        @contextlib.contextmanager
        def memory_pool(self, tag: str) -> Iterator[None]:
            seen.append(settings.read())
            yield

    seen: list[str] = []
    text = "expandable_segments:True"
    settings = FakeSettings(text)
    DeviceKVMemory(Watched(), torch.device("cpu"), allocator=settings).zeros(8)
    assert (seen, settings.text) == ([f"{text},expandable_segments:False"], text)
    DeviceKVMemory(Watched(), torch.device("cpu")).zeros(8)
    assert seen[1:] == [text]


@pytest.mark.parametrize(
    ("transfer", "apart"),
    [
        ({"nixl": {"path": "p2p"}}, True),
        ({"nixl": {"path": "nixl"}}, False),
        ({}, False),
        ({"connector": "mooncake"}, False),
        ({"connector": "file", "file": {"directory": "/kv"}}, False),
    ],
)
def test_only_the_path_p2p_needs_that(transfer: dict[str, object], apart: bool) -> None:
    assert KVTransferSettings.model_validate(transfer).carrier_settings.only_maps_memory is apart


def shared(kind: str) -> SharedRange:
    return SharedRange(kind, 4096, 64, 1024, b"" if kind == "posix_fd" else FABRIC)  # type: ignore[arg-type]


def test_cumem_memory_is_shared_by_its_own_handle() -> None:
    tensor = torch.zeros(100, dtype=torch.float32)
    before = num_open_fds()
    export = DeviceKVMemory(FakePools(lambda: os.memfd_create("test")), DEVICE).export(tensor)
    assert export.range == SharedRange("posix_fd", 1 << 20, 64, 400)
    assert num_open_fds() == before + 1
    export.close()
    assert num_open_fds() == before
    export = DeviceKVMemory(FakePools(lambda: FABRIC), DEVICE).export(tensor)
    assert (export.range, export.fd) == (SharedRange("fabric", 1 << 20, 64, 400, FABRIC), None)


def test_a_tensor_that_does_not_lie_in_one_allocation_is_not_shared() -> None:
    before = num_open_fds()
    memory = DeviceKVMemory(FakePools(lambda: os.memfd_create("test"), num_bytes=256), DEVICE)
    with pytest.raises(NotShareable, match="not within an allocation"):
        memory.export(torch.zeros(100, dtype=torch.float32))
    assert num_open_fds() == before


def test_plain_memory_is_shared_by_the_handle_of_its_allocation_and_the_offset_in_it() -> None:
    driver, tensor = FakePeerDriver(), torch.zeros(64, dtype=torch.uint8)
    start = tensor.data_ptr() - 128
    driver.allocations = {start: 4096}
    export = memory_with(driver).export(tensor)
    assert export.range == SharedRange("cuda_ipc", 4096, 128, 64, start.to_bytes(64, "little"))


def test_memory_without_a_handle_says_so() -> None:
    driver, tensor = FakePeerDriver(refuses="ipc_handle"), torch.zeros(64, dtype=torch.uint8)
    driver.allocations = {tensor.data_ptr(): 64}
    with pytest.raises(
        NotShareable, match=r"expandable_segments.*ipc_handle: CUDA_ERROR_INVALID_VALUE"
    ):
        memory_with(driver).export(tensor)

    def refuse() -> int:
        raise MemoryPoolError("memory of 'kv_cache' cannot be shared")

    with pytest.raises(NotShareable, match="'kv_cache' cannot be shared"):
        DeviceKVMemory(FakePools(refuse), DEVICE).export(tensor)


@pytest.mark.parametrize("kind", ["posix_fd", "fabric"])
def test_a_handle_is_imported_mapped_made_accessible_and_let_go_in_this_order(kind: str) -> None:
    driver = FakePeerDriver()
    mapping = memory_with(driver).map(shared(kind), 5 if kind == "posix_fd" else None)
    assert driver.calls == ["import_handle", "reserve", "map", "release", "set_access"]
    assert driver.held == {"addresses", "mapping"}, "the mapping alone keeps the memory"
    assert (mapping.address, mapping.num_bytes) == (0x10000 + 64, 1024)
    mapping.close()
    assert driver.calls[5:] == ["unmap", "free_address"]
    assert not driver.held


@pytest.mark.parametrize("refuses", ["import_handle", "reserve", "map", "set_access"])
def test_a_refusal_leaves_nothing_mapped(refuses: str) -> None:
    driver = FakePeerDriver(refuses)
    with pytest.raises(NotShareable, match=f"posix_fd.*{refuses}: CUDA_ERROR_INVALID_VALUE"):
        memory_with(driver).map(shared("posix_fd"), 5)
    assert not driver.held


def test_an_ipc_handle_is_opened_once_and_closed_by_its_start() -> None:
    driver = FakePeerDriver()
    mapping = memory_with(driver).map(shared("cuda_ipc"), None)
    assert mapping.address == 0x20000 + 64
    mapping.close()
    assert driver.calls == ["open_ipc", "close_ipc"]
    driver.refuses = "open_ipc"
    with pytest.raises(NotShareable, match="cuda_ipc"):
        memory_with(driver).map(shared("cuda_ipc"), None)


def test_memory_of_another_kind_of_device_is_refused() -> None:
    driver = FakePeerDriver()
    with pytest.raises(NotShareable, match="kind memfd"):
        memory_with(driver).map(SharedRange("memfd", 4096, 0, 4096), 5)
    with pytest.raises(NotShareable, match="not within"):
        memory_with(driver).map(SharedRange("fabric", 4096, 4096, 1, FABRIC), None)
    assert driver.calls == []


def test_what_the_machine_lacks_is_the_reason() -> None:
    def without_bindings(index: int) -> CudaMemoryDriver:
        raise ConfigError("enable_cumem_allocator needs the package cuda-bindings")

    def without_mapping(index: int) -> CudaMemoryDriver:
        raise DriverRefused("cuMemGetAllocationGranularity: CUDA_ERROR_NOT_SUPPORTED")

    for new_driver, reason in (
        (without_bindings, r"pip install 'pdlaunch\[cuda\]'"),
        (without_mapping, "NOT_SUPPORTED"),
    ):
        with pytest.raises(NotShareable, match=reason):
            DeviceKVMemory(NoMemoryPools(), DEVICE, new_driver).map(shared("cuda_ipc"), None)
