"""Pools on a device, by the driver's own count."""

import os
import subprocess
import sys

import pytest
import torch

from pdlaunch.engine.memory.pools import KV_CACHE, WEIGHTS, CuMemPools

pytest.importorskip("cuda.bindings")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 1024**2


def used_bytes() -> int:
    torch.cuda.synchronize()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return total_bytes - free_bytes


def random_bytes(num_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device="cuda")


def test_freed_memory_comes_back_also_from_a_sleeping_pool(pools: CuMemPools) -> None:
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    before = used_bytes()
    with pools.memory_pool(KV_CACHE):
        cache = random_bytes(256 * MIB)
    pools.sleep([KV_CACHE])
    del cache
    torch.cuda.empty_cache()
    assert used_bytes() <= before + 32 * MIB
    assert not pools._allocations


def test_what_temporaries_used_is_given_back_at_once(pools: CuMemPools) -> None:
    with pools.memory_pool(WEIGHTS):
        parts = [random_bytes(32 * MIB) for _ in range(8)]
        whole = torch.cat(parts)
        expected = whole.cpu()
        del parts
    assert sum(each.num_bytes for each in pools._allocations.values()) == 256 * MIB
    with pools.memory_pool(WEIGHTS):
        more = random_bytes(32 * MIB)
    pools.sleep([WEIGHTS], keep=[WEIGHTS])
    pools.wake_up([WEIGHTS])
    assert torch.equal(whole.cpu(), expected)
    del more
    torch.cuda.empty_cache()
    assert sum(each.num_bytes for each in pools._allocations.values()) == 256 * MIB


def test_too_large_is_torchs_out_of_memory(pools: CuMemPools) -> None:
    with pytest.raises(torch.OutOfMemoryError), pools.memory_pool(KV_CACHE):
        torch.empty(2**42, dtype=torch.uint8, device="cuda")


def run_with(conf: str, code: str) -> str:
    """Return what the code prints in a process with these settings of the allocator."""
    environ = os.environ | ({"PYTORCH_ALLOC_CONF": conf} if conf else {})
    result = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize("conf", ["", "expandable_segments:True,max_split_size_mb:512"])
@pytest.mark.processes
def test_the_interpreter_exits_cleanly_with_pools_tensors_and_a_sleeping_tag(conf: str) -> None:
    code = """
import torch
from pdlaunch.engine.memory.pools import read_allocator_settings
from pdlaunch.engine.memory.pools import open_memory_pools
pools = open_memory_pools(enabled=True, device=torch.device("cuda", 0))
with pools.memory_pool("weights"):
    weights = torch.ones(2**26, device="cuda")
    freed = torch.ones(2**24, device="cuda")
with pools.memory_pool("kv_cache"):
    cache = torch.ones(2**26, device="cuda")
del freed
pools.sleep(["kv_cache"])
assert sum(each.num_bytes for each in pools._allocations.values()) >= 2**29
elsewhere = torch.ones(2**26, device="cuda")
segments = [
    segment
    for segment in torch.cuda.memory_snapshot()
    if segment["address"] <= elsewhere.data_ptr() < segment["address"] + segment["total_size"]
]
print([segment["is_expandable"] for segment in segments], read_allocator_settings())
print(int(weights.sum()))
"""
    is_expandable = "expandable_segments:True" in conf  # the setting is the user's again
    assert run_with(conf, code) == f"{[is_expandable]} {conf}\n{2**26}\n"


@pytest.mark.processes
def test_what_peers_only_map_has_a_handle_beside_expandable_segments() -> None:
    code = """
import torch
from pdlaunch.engine.memory.pools import open_kv_memory
from pdlaunch.engine.memory.kv_memory import NotShareable
from pdlaunch.engine.memory.pools import MemoryPools
device = torch.device("cuda", 0)
# A free expandable segment is there, which torch must not take.
torch.ones(2**28, device=device)
for mapped_alone in (True, False):
    memory = open_kv_memory(MemoryPools(), device, shared=True, mapped_alone=mapped_alone)
    tensor = memory.zeros(2**26)
    try:
        print(memory.export(tensor).range.kind)
    except NotShareable:
        print("none")
"""
    assert run_with("expandable_segments:True", code).split() == ["cuda_ipc", "none"]
