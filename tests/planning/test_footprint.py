"""The footprint of a rank, against the rooms that allocate."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.engine.kvcache.manager import KVCacheManager
from tests.checks.contexts import CPU, SHAPE, SMALL_SHAPE, on

HYBRID = (512, 512, 512, 512, 512, None) * 4 + (512, 512)


@given(
    windows=st.lists(st.sampled_from([None, 64, 100, 512]), min_size=1, max_size=12),
    block_size=st.sampled_from([1, 16, 24, 128]),
    length=st.integers(2, 4000),
)
def test_blocks_are_those_of_the_kv_cache(windows, block_size, length):
    shape = replace(SMALL_SHAPE, num_layers=len(windows), layer_windows=tuple(windows))
    settings = {"block_size": block_size, "max_model_len": length, "dtype": "float32"}
    needed = on(CPU, shapes=(shape, shape), **settings).engines["prefill"].footprint
    groups = make_groups(windows)
    layout = KVCacheLayout(groups, shape.num_kv_heads, shape.head_dim, block_size, 4)
    assert needed.layout.block_bytes == layout.block_bytes
    blocks = KVCacheManager(groups, 1, block_size).min_blocks(length)
    assert needed.min_kv_bytes == blocks * layout.block_bytes


@pytest.mark.parametrize("tp_size", [1, 3, 9])
def test_weights_of_all_ranks_cover_the_model(tp_size):
    engine = on(CPU, dtype="float32", prefill__tensor_parallel_size=tp_size).engines["prefill"]
    whole = SMALL_SHAPE.num_parameters * 4
    assert whole / tp_size <= engine.footprint.weight_bytes <= whole


@given(kv_mib=st.integers(1, 2000))
def test_the_longest_request_is_the_longest_that_fits(kv_mib):
    shape = replace(SMALL_SHAPE, num_layers=26, layer_windows=HYBRID)
    kv_bytes = kv_mib * 1024**2
    engine = on(CPU, shapes=(shape, shape)).engines["decode"]
    fits = engine.footprint.longest_request_tokens(kv_bytes)

    def needs(num_tokens):
        return replace(engine.footprint, max_model_len=num_tokens).min_kv_bytes

    assert fits == 0 or needs(fits) <= kv_bytes
    assert fits == SHAPE.max_position_embeddings or needs(fits + 16) > kv_bytes
