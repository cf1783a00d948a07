"""The checksum kernel against xxHash: by Triton's interpreter on the CPU, and on a GPU as it is."""

from __future__ import annotations

import pytest
import torch

from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.transfer.integrity.checksum import KVHasher
from tests.interpreter import needs_triton, run_interpreted
from tests.transfer.fakes import layout_of

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_triton
@pytest.mark.processes
def test_kernel_equals_xxhash() -> None:
    run_interpreted("tests.transfer.integrity.interpreted_checksum")


def layouts() -> list[KVCacheLayout]:
    """Of an 8B model, of one with an odd number of stripes a head, and one that is too small for
    the kernel.
    """
    large = KVCacheLayout(
        make_groups([None] * 32), num_kv_heads=8, head_dim=128, block_size=16, dtype_bytes=2
    )
    return [
        large,
        layout_of(num_kv_heads=3, block_size=3, num_layers=5, head_dim=20),
        layout_of(block_size=1),
    ]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("layout", layouts(), ids=lambda layout: str(layout.head_bytes))
def test_a_gpu_and_a_cpu_agree(layout: KVCacheLayout) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32}[layout.dtype_bytes]
    kv_cache = torch.randn((40, *layout.block_shape()), device="cuda").to(dtype)
    on_cpu = KVHasher(kv_cache.cpu(), layout)
    hasher = KVHasher(kv_cache, layout)
    torch.cuda.synchronize()
    chosen = [
        ([39, 0, 7], slice(None)),
        ([5], slice(1, 3)),
        ([], slice(None)),
        (list(range(40)), slice(0, 1)),
    ]
    started = [hasher.start(block_ids, heads) for block_ids, heads in chosen]
    for (block_ids, heads), checksums in zip(chosen, started, strict=True):
        assert checksums.result().tolist() == on_cpu.checksums(block_ids, heads)
        assert checksums.ready()


@pytest.mark.gpu
@on_gpu
def test_results_that_nobody_wants_do_no_harm() -> None:
    """Their memory is not used again before the kernel has ended."""
    layout = layouts()[0]
    kv_cache = torch.randn((64, *layout.block_shape()), device="cuda").to(torch.bfloat16)
    hasher = KVHasher(kv_cache, layout)
    torch.cuda.synchronize()
    expected = hasher.checksums(range(64), slice(None))
    for _ in range(50):
        hasher.start(range(63, -1, -1), slice(None))
        assert hasher.start(range(64), slice(None)).result().tolist() == expected
