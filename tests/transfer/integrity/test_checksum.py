"""Checksums of KV blocks: any changed byte changes its checksum, on CPU and GPU. The kernel is
compared with xxHash, in Triton's interpreter on the CPU and on a GPU.
"""

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.transfer.integrity.checksum import KVHasher
from pdlaunch.transfer.regions import native_regions
from tests.interpreter import needs_triton, run_module
from tests.transfer.fakes import layout_of, random_cache

LAYOUT = layout_of(num_kv_heads=3)


def hasher_of(kv_cache: torch.Tensor, layout: KVCacheLayout) -> KVHasher:
    return KVHasher(native_regions(kv_cache, layout))


def test_one_checksum_a_block_and_head_over_its_bytes_however_heads_are_split_into_ranks():
    kv_cache = random_cache(LAYOUT, 4, seed=0)
    expected = [
        [xxhash.xxh3_64_intdigest(kv_cache[block, head].numpy().tobytes()) for head in (1, 2)]
        for block in (2, 0)
    ]
    assert hasher_of(kv_cache, LAYOUT).start([[2, 0]], slice(1, 3)).result().tolist() == expected
    for index, head in enumerate((1, 2)):
        part = hasher_of(kv_cache[:, head : head + 1].contiguous(), layout_of(num_kv_heads=1))
        found = part.start([[2, 0]], slice(None)).result().tolist()
        assert found == [[row[index]] for row in expected]
    assert hasher_of(kv_cache, LAYOUT).start([[]], slice(None)).result().tolist() == []


@given(st.integers(0, 3), st.integers(0, 2), st.data())
@settings(max_examples=50, deadline=None)
def test_any_changed_byte_changes_exactly_one_checksum(block, head, data):
    kv_cache = random_cache(LAYOUT, 4, seed=0)
    hasher = hasher_of(kv_cache, LAYOUT)
    before = hasher.start([range(4)], slice(None)).result().tolist()
    share = kv_cache[block, head].view(torch.uint8).view(-1)
    share[data.draw(st.integers(0, len(share) - 1))] ^= data.draw(st.integers(1, 255))
    after = hasher.start([range(4)], slice(None)).result().tolist()
    differing = [(b, h) for b in range(4) for h in range(3) if before[b][h] != after[b][h]]
    assert differing == [(block, head)]


@needs_triton
@pytest.mark.processes
def test_kernels_hash_as_xxhash_and_copy_pieces_and_nothing_beside_them() -> None:
    run_module("tests.transfer.interpreted_kernels", TRITON_INTERPRET="1")


# Layouts of an 8B model, of a model with an odd number of stripes in a head, and of a model that is
# too small for the kernel.
LAYOUTS = [
    KVCacheLayout(
        make_groups([None] * 32), num_kv_heads=8, head_dim=128, block_size=16, dtype_bytes=2
    ),
    layout_of(num_kv_heads=3, block_size=3, num_layers=5, head_dim=20),
    layout_of(block_size=1),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.head_bytes))
def test_a_gpu_and_a_cpu_agree_and_results_that_nobody_wants_do_no_harm(layout) -> None:
    """The memory of dropped results is not used again before the kernel has ended."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[layout.dtype_bytes]
    kv_cache = torch.randn((40, *layout.block_shape()), device="cuda").to(dtype)
    on_cpu, hasher = hasher_of(kv_cache.cpu(), layout), hasher_of(kv_cache, layout)
    torch.cuda.synchronize()
    chosen = [
        ([39, 0, 7], slice(None)),
        ([5], slice(1, 3)),
        ([], slice(None)),
        (list(range(40)), slice(0, 1)),
    ] * 10
    started = []
    for block_ids, heads in chosen:
        hasher.start([range(39, -1, -1)], slice(None))
        started.append(hasher.start([block_ids], heads))
    for (block_ids, heads), checksums in zip(chosen, started, strict=True):
        assert checksums.result().tolist() == on_cpu.start([block_ids], heads).result().tolist()
        assert checksums.ready()
