"""The order of driver calls, with a driver and pools that only pretend; tensors are on the CPU."""

import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from pdlaunch.engine.memory.kv_memory import Export, NotShareable, SharedRange
from pdlaunch.engine.memory.pools import DeviceKVMemory, MemoryPools
from pdlaunch.errors import MemoryPoolError
from tests.engine.memory.fake_driver import FakeDriver
from tests.engine.memory.open_files import num_open_fds

FABRIC = bytes(range(64))
DEVICE = torch.device("cuda", 1)
TENSOR = torch.zeros(100, dtype=torch.float32)


def memory_with(driver: FakeDriver) -> DeviceKVMemory:
    return DeviceKVMemory(MemoryPools(), DEVICE, lambda index: driver)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("text", ["", "max_split_size_mb:64,expandable_segments:True"])
@pytest.mark.processes
def test_what_peers_only_map_lies_outside_expandable_segments(variable: str, text: str) -> None:
    """The whole setting is kept meanwhile, and is there again afterwards, also after an error."""
    code = """
import contextlib, json, torch
from pdlaunch.engine.memory.pools import read_allocator_settings
from pdlaunch.engine.memory.pools import DeviceKVMemory
from pdlaunch.engine.memory.pools import MemoryPools
class Watched(MemoryPools):
    def memory_pool(self, tag):
        seen.append(read_allocator_settings())
        return contextlib.nullcontext()
seen = []
for mapped_alone, size in ((True, 8), (False, 8), (True, -1)):
    with contextlib.suppress(RuntimeError):
        DeviceKVMemory(Watched(), torch.device("cpu"), mapped_alone=mapped_alone).zeros(size)
print(json.dumps([*seen, read_allocator_settings()]))
"""
    environ = {variable: text, "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    inside = f"{text},expandable_segments:False" if text else ""
    assert json.loads(result.stdout) == [inside, text, inside, text]


def shared(kind: str) -> SharedRange:
    return SharedRange(kind, 4096, 64, 1024, b"" if kind == "posix_fd" else FABRIC)  # type: ignore[arg-type]


def test_a_tensor_of_a_pool_is_shared_if_it_lies_in_one_allocation() -> None:
    def export(_start: int, num_bytes: int) -> Export:
        return Export(SharedRange("posix_fd", 512, 64, num_bytes), os.memfd_create("test"))

    before = num_open_fds()
    memory = DeviceKVMemory(Mock(export=export), DEVICE)
    found = memory.export(TENSOR)
    assert found.range == SharedRange("posix_fd", 512, 64, 400)
    assert num_open_fds() == before + 1
    found.close()
    with pytest.raises(NotShareable, match="not within an allocation"):
        memory.export(torch.zeros(200, dtype=torch.float32))
    assert num_open_fds() == before


def test_plain_memory_is_shared_by_the_handle_of_its_allocation_and_the_offset_in_it() -> None:
    start = TENSOR.data_ptr() - 128
    found = memory_with(FakeDriver(plain={start: 4096})).export(TENSOR)
    assert found.range == SharedRange("cuda_ipc", 4096, 128, 400, start.to_bytes(64, "little"))


def test_memory_without_a_handle_says_so() -> None:
    driver = FakeDriver(failing="ipc_handle", plain={TENSOR.data_ptr(): 400})
    with pytest.raises(NotShareable, match=r"expandable_segments.*ipc_handle: CUDA_ERROR_UNKNOWN"):
        memory_with(driver).export(TENSOR)

    refuse = Mock(side_effect=MemoryPoolError("memory of 'kv_cache' cannot be shared"))
    with pytest.raises(NotShareable, match="'kv_cache' cannot be shared"):
        DeviceKVMemory(Mock(export=refuse), DEVICE).export(TENSOR)


@pytest.mark.parametrize("kind", ["posix_fd", "fabric"])
def test_a_handle_is_imported_mapped_made_accessible_and_let_go_in_this_order(kind: str) -> None:
    driver = FakeDriver()
    mapping = memory_with(driver).map(shared(kind), 5 if kind == "posix_fd" else None)
    assert driver.calls == ["import_handle", "reserve", "map", "release", "set_access"]
    assert driver.used_bytes == 4096, "the mapping alone keeps the memory"
    (start,) = driver.ranges
    assert (mapping.address, mapping.num_bytes) == (start + 64, 1024)
    mapping.close()
    assert driver.calls[5:] == ["unmap", "free_address"]
    assert driver.used_bytes == 0


@pytest.mark.parametrize("refuses", ["import_handle", "reserve", "map", "set_access"])
def test_a_refusal_leaves_nothing_mapped(refuses: str) -> None:
    driver = FakeDriver(failing=refuses)
    with pytest.raises(NotShareable, match=f"posix_fd.*{refuses}: CUDA_ERROR_UNKNOWN"):
        memory_with(driver).map(shared("posix_fd"), 5)
    assert not driver.ranges
    assert not driver.handles


def test_an_ipc_handle_is_opened_once_and_closed_by_its_start() -> None:
    driver = FakeDriver()
    mapping = memory_with(driver).map(shared("cuda_ipc"), None)
    assert driver.opened == {mapping.address - 64}
    mapping.close()
    assert driver.calls == ["open_ipc", "close_ipc"]
    driver.fail("open_ipc")
    with pytest.raises(NotShareable, match="cuda_ipc"):
        memory_with(driver).map(shared("cuda_ipc"), None)


def test_memory_of_another_kind_of_device_is_refused() -> None:
    driver = FakeDriver()
    with pytest.raises(NotShareable, match="kind memfd"):
        memory_with(driver).map(SharedRange("memfd", 4096, 0, 4096), 5)
    with pytest.raises(NotShareable, match="not within"):
        memory_with(driver).map(SharedRange("fabric", 4096, 4096, 1, FABRIC), None)
    assert driver.calls == []
