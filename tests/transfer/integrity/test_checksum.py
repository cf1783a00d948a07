from __future__ import annotations

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pdlaunch.transfer.handshake import describe_groups, draw_engine_id
from pdlaunch.transfer.integrity.checksum import KVHasher
from tests.transfer.fakes import layout_of, random_cache


def test_one_checksum_a_block_and_head_over_its_bytes():
    layout = layout_of(num_kv_heads=3)
    kv_cache = random_cache(layout, 4, seed=0)
    found = KVHasher(kv_cache, layout).checksums([2, 0], slice(1, 3))
    expected = [
        [xxhash.xxh3_64_intdigest(kv_cache[block, head].numpy().tobytes()) for head in (1, 2)]
        for block in (2, 0)
    ]
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checksums_do_not_depend_on_the_split_into_ranks(dtype):
    whole = random_cache(layout_of(num_kv_heads=3), 2, seed=0).to(dtype)
    bytes_a_value = whole.element_size()

    def hasher(part):
        layout = layout_of(num_kv_heads=part.shape[1])
        layout = type(layout)(
            layout.groups, layout.num_kv_heads, layout.head_dim, layout.block_size, bytes_a_value
        )
        return KVHasher(part.contiguous(), layout)

    of_parts = [
        hasher(whole[:, head : head + 1]).checksums([0, 1], slice(None)) for head in range(3)
    ]
    joined = [[part[block][0] for part in of_parts] for block in range(2)]
    assert hasher(whole).checksums([0, 1], slice(None)) == joined


@given(st.integers(0, 3), st.integers(0, 2), st.data())
@settings(max_examples=50, deadline=None)
def test_any_changed_byte_changes_exactly_one_checksum(block, head, data):
    layout = layout_of(num_kv_heads=3)
    kv_cache = random_cache(layout, 4, seed=0)
    hasher = KVHasher(kv_cache, layout)
    before = hasher.checksums(range(4), slice(None))
    share = kv_cache[block, head].view(torch.uint8).view(-1)
    share[data.draw(st.integers(0, len(share) - 1))] ^= data.draw(st.integers(1, 255))
    after = hasher.checksums(range(4), slice(None))
    differing = [(b, h) for b in range(4) for h in range(3) if before[b][h] != after[b][h]]
    assert differing == [(block, head)]


def test_engine_ids_are_32_hex_digits_and_differ():
    drawn = draw_engine_id()
    assert len(bytes.fromhex(drawn)) == 16
    assert drawn != draw_engine_id()


def test_groups_are_described_in_one_line():
    from pdlaunch.engine.kvcache.groups import make_groups

    assert (
        describe_groups(make_groups([512, 512, None, 512, 512]))
        == "full: 2; 512: 0; 512: 1; 512: 3; 512: 4"
    )
    assert describe_groups(make_groups([None] * 30)) == "full: 0-29"
    assert describe_groups(make_groups([None])) == "full: 0"
