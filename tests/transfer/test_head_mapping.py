from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.errors import HandshakeError
from pdlaunch.transfer.handshake import heads_of_rank, map_sources

HEADS = st.integers(1, 16)


@st.composite
def tp_sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    num_kv_heads = draw(HEADS)
    fits = [size for size in range(1, 33) if num_kv_heads % size == 0 or size % num_kv_heads == 0]
    return num_kv_heads, draw(st.sampled_from(fits)), draw(st.sampled_from(fits))


@given(tp_sizes())
def test_every_puller_gets_exactly_its_heads_from_ranks_that_hold_them(sizes):
    num_kv_heads, prefill_tp_size, decode_tp_size = sizes
    for puller in range(decode_tp_size):
        sources = map_sources(
            num_kv_heads=num_kv_heads,
            prefill_tp_size=prefill_tp_size,
            decode_tp_size=decode_tp_size,
            decode_tp_rank=puller,
        )
        pulled = [head for source in sources for head in source.heads]
        assert sorted(pulled) == list(heads_of_rank(num_kv_heads, decode_tp_size, puller))
        for source in sources:
            assert set(source.heads) <= set(
                heads_of_rank(num_kv_heads, prefill_tp_size, source.tp_rank)
            )


@given(tp_sizes())
def test_every_holder_is_visited_by_as_many_pullers_as_it_is_told(sizes):
    num_kv_heads, prefill_tp_size, decode_tp_size = sizes
    visits: Counter[int] = Counter()
    told: dict[int, set[int]] = {}
    for puller in range(decode_tp_size):
        for source in map_sources(
            num_kv_heads=num_kv_heads,
            prefill_tp_size=prefill_tp_size,
            decode_tp_size=decode_tp_size,
            decode_tp_rank=puller,
        ):
            visits[source.tp_rank] += 1
            told.setdefault(source.tp_rank, set()).add(source.num_decode_ranks)
    assert set(visits) == set(range(prefill_tp_size))
    assert told == {holder: {count} for holder, count in visits.items()}


def test_unneeded_replica_is_visited_without_heads():
    sources = map_sources(num_kv_heads=2, prefill_tp_size=4, decode_tp_size=1, decode_tp_rank=0)
    assert [len(source.heads) for source in sources] == [1, 0, 1, 0]


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(HandshakeError, match="tensor_parallel_size 2 does not fit 3 KV heads"):
        map_sources(num_kv_heads=3, prefill_tp_size=2, decode_tp_size=1, decode_tp_rank=0)
