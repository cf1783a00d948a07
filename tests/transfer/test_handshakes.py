"""Handshakes with prefill ranks, in a World of fakes."""

from __future__ import annotations

import itertools

from pdlaunch.protocol.control import Address, Entry, PairFailed, PairReady
from tests.transfer.pull_world import HolderRank, World
from tests.transfer.rank_process import grant, pull


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


def test_an_unreachable_holder_is_tried_again_with_growing_pauses(world):
    absent = HolderRank(world.clock, world.fabric)
    world.peers.update([absent.entry()])
    pauses = []
    for failures in range(1, 6):
        while len(world.reports) < failures:
            world.clock.now += 0.125
            world.turn(1)
        pauses.append(world.clock.now)
    gaps = [later - earlier for earlier, later in itertools.pairwise(pauses)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > gaps[0]
    assert not any(report.fatal for report in world.reports)
    assert (
        "no answer to the handshake from prefill-0/rank-0 at fake://1 within 5 s"
        in world.reports[0].error
    )
    world.holders["fake://1"] = absent
    world.clock.now += 20
    world.turn()
    world.clock.now += 20
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
    new = world.add(incarnation=2)
    world.peers.update([new.entry()])
    world.turn()
    assert isinstance(world.reports[-1], PairReady)


def test_wrong_bytes_in_the_first_read_fail_the_handshake(world):
    holder = world.add()
    world.fabric.agents["prefill-0/rank-0#1"].scratch[7] ^= 1
    world.peers.update([holder.entry()])
    world.turn()
    assert (
        "prefill-0/rank-0 cannot be read: the first READ brought wrong bytes"
        in world.reports[-1].error
    )
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


def test_a_holder_with_another_engine_id_than_the_registry_is_not_used(world):
    holder = world.add()
    entry = holder.entry()
    world.peers.update(
        [
            Entry(
                **{name: getattr(entry, name) for name in entry.__struct_fields__}
                | {"engine_id": "f" * 32}
            )
        ]
    )
    world.turn()
    assert "belongs to engine_id 1111" in world.reports[-1].error
    assert f"not to {'f' * 32}" in world.reports[-1].error


def test_ranks_of_one_engine_must_share_an_engine_id(world):
    entries = [
        Entry(
            name=f"prefill-0/rank-{tp_rank}",
            kind="rank",
            incarnation=1,
            engine="prefill-0",
            role="prefill",
            tp_rank=tp_rank,
            tp_size=2,
            engine_id=f"{tp_rank}" * 32,
            address=Address(side_channel=f"tcp://h{tp_rank}:1"),
        )
        for tp_rank in range(2)
    ]
    world.peers.update(entries)
    (failed,) = world.reports
    assert failed.fatal
    for part in (
        "prefill-0/rank-0 at tcp://h0:1",
        "0" * 32,
        "prefill-0/rank-1 at tcp://h1:1",
        "1" * 32,
    ):
        assert part in failed.error
