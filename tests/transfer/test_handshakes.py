"""Handshakes with prefill ranks: properties that must be equal on both sides, the heads that each
rank reads, and fake peers that come, go and send false data.
"""

from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.errors import HandshakeError
from pdlaunch.protocol.control import PairFailed, PairReady
from pdlaunch.protocol.side_channel import Compatibility
from pdlaunch.transfer.handshake import compare, heads_of_rank, map_sources
from tests.transfer.fakes import layout_of
from tests.transfer.pull_world import HolderRank, World, compatibility
from tests.transfer.rank_process import grant, pull

OURS = compatibility(layout_of())


@pytest.mark.parametrize("field", Compatibility.__struct_fields__)
def test_a_field_that_differs_is_named_with_both_values(field):
    names = {"local": "decode-0/rank-0", "peer": "prefill-0/rank-0"}
    compare(OURS, OURS, **names)
    ours = getattr(OURS, field)
    theirs = 99 if isinstance(ours, int) else "other"
    with pytest.raises(HandshakeError) as caught:
        compare(OURS, msgspec.structs.replace(OURS, **{field: theirs}), **names)
    expected = f"{field}: decode-0/rank-0 has {ours!r}, prefill-0/rank-0 has {theirs!r}"
    assert expected in str(caught.value)


@st.composite
def tp_sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    num_kv_heads = draw(st.integers(1, 16))
    fits = [size for size in range(1, 33) if num_kv_heads % size == 0 or size % num_kv_heads == 0]
    return num_kv_heads, draw(st.sampled_from(fits)), draw(st.sampled_from(fits))


@given(tp_sizes())
def test_every_reader_gets_its_heads_and_every_holder_as_many_readers_as_it_is_told(sizes):
    num_kv_heads, prefill_tp_size, decode_tp_size = sizes
    visits: Counter[int] = Counter()
    told: dict[int, set[int]] = {}
    for reader in range(decode_tp_size):
        sources = map_sources(
            num_kv_heads=num_kv_heads,
            prefill_tp_size=prefill_tp_size,
            decode_tp_size=decode_tp_size,
            decode_tp_rank=reader,
        )
        pulled = [head for source in sources for head in source.heads]
        assert sorted(pulled) == list(heads_of_rank(num_kv_heads, decode_tp_size, reader))
        for source in sources:
            held = heads_of_rank(num_kv_heads, prefill_tp_size, source.tp_rank)
            assert set(source.heads) <= set(held)
            visits[source.tp_rank] += 1
            told.setdefault(source.tp_rank, set()).add(source.num_decode_ranks)
    assert set(visits) == set(range(prefill_tp_size))
    assert told == {holder: {count} for holder, count in visits.items()}


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(HandshakeError, match="tensor_parallel_size 2 does not fit 3 KV heads"):
        map_sources(num_kv_heads=3, prefill_tp_size=2, decode_tp_size=1, decode_tp_rank=0)


def test_handshake_happens_at_the_first_pull_when_it_is_not_asked_for_before():
    world = World(eager=False)
    holder = world.add()
    world.peers.update([holder.entry()])
    world.turn()
    assert holder.channels == []
    holder.holder.grant(grant("r", [4]))
    world.pulls.start(pull("p", holder.remote("r"), [1]))
    world.turn()
    assert world.finished().ok


def test_an_unreachable_holder_is_tried_again_for_hours(world):
    absent = HolderRank(world.clock, world.fabric)
    world.peers.update([absent.entry()])
    while len(world.reports) < 1100:
        world.clock.now += 5.0
        world.turn(1)
    assert not any(report.fatal for report in world.reports)
    expected = "no answer to the handshake from prefill-0/rank-0 at fake://1 within 5 s"
    assert expected in world.reports[0].error
    world.holders["fake://1"] = absent
    world.clock.now += 5.0
    world.turn()
    assert isinstance(world.reports[-1], PairReady)


def test_incompatible_engines_are_final_until_a_restart(world):
    holder = world.add(block_size=32, dtype="bfloat16")
    world.peers.update([holder.entry()])
    world.turn()
    (failed,) = world.reports
    assert isinstance(failed, PairFailed)
    assert failed.fatal
    assert "dtype: decode-0/rank-0 has 'float32', prefill-0/rank-0 has 'bfloat16'" in failed.error
    assert "block_size: decode-0/rank-0 has 16, prefill-0/rank-0 has 32" in failed.error
    world.clock.now += 100
    world.turn()
    assert len(world.reports) == 1
    world.connect(incarnation=2)


def test_wrong_bytes_in_the_first_read_fail_the_handshake(world):
    holder = world.add()
    world.fabric.agents["prefill-0/rank-0#1"].scratch[7] ^= 1
    world.peers.update([holder.entry()])
    world.turn()
    expected = "prefill-0/rank-0 cannot be read: the first READ brought wrong bytes"
    assert expected in world.reports[-1].error
    assert not world.reports[-1].fatal
    assert world.connector.peers == []


def test_a_handshake_is_not_repeated_while_its_read_may_still_write(world):
    holder = world.add()
    world.fabric.stalled = True
    world.peers.update([holder.entry()])
    for _ in range(10):
        world.turn()
        world.clock.now += 5.0
    assert "no answer to the first READ" in world.reports[0].error
    assert world.connector.added == ["prefill-0/rank-0#1"]
    world.fabric.stalled = False
    world.fabric.land()
    for _ in range(2):
        world.turn()
        world.clock.now += 5.0
    world.turn()
    assert isinstance(world.reports[-1], PairReady)
    assert world.connector.added == ["prefill-0/rank-0#1"] * 2
    assert world.connector.peers == ["prefill-0/rank-0#1"]


def test_ranks_of_one_engine_must_share_an_engine_id(world):
    first, second = (world.add(tp_rank=rank, tp_size=3) for rank in range(2))
    world.peers.update([first.entry(), msgspec.structs.replace(second.entry(), engine_id="2" * 32)])
    (failed,) = world.reports
    assert failed.fatal
    assert "prefill-0/rank-0 at fake://1 has " + "1" * 32 in failed.error
    assert "prefill-0/rank-1 at fake://11 has " + "2" * 32 in failed.error


@pytest.mark.parametrize(
    ("field", "shown", "expected"),
    [
        ("tp_rank", 0, "shows 0 for prefill-0/rank-1 at fake://11"),
        ("tp_size", 6, "shows 6 for prefill-0/rank-1 at fake://11"),
        ("incarnation", 2, "shows 2 for prefill-0/rank-1 at fake://11"),
        ("engine_id", "f" * 32, f"belongs to engine_id {'1' * 32}, not {'f' * 32}"),
    ],
)
def test_who_answers_is_not_who_the_registry_names(world, field, shown, expected):
    """The rank is not read from. Once the registry is right, the pair is connected."""
    holders = [world.add(tp_rank=tp_rank, tp_size=3) for tp_rank in range(3)]
    others = [] if field == "engine_id" else [holders[0].entry(), holders[2].entry()]
    entry = msgspec.structs.replace(holders[1].entry(), **{field: shown})
    if field == "engine_id":
        # Rank 0's id counts, so its entry must be wrong too.
        others = [msgspec.structs.replace(holders[0].entry(), engine_id=shown)]
    world.peers.update([*others, entry])
    world.turn()
    errors = [report.error for report in world.reports if isinstance(report, PairFailed)]
    assert expected in errors[-1]
    assert "prefill-0/rank-1#1" not in world.connector.added
    world.peers.update([holder.entry() for holder in holders])
    world.turn()
    for holder in holders:
        holder.holder.grant(grant("r", [4]))
    world.pulls.start(pull("p", holders[0].remote("r"), [1]))
    world.turn()
    assert world.finished().ok
