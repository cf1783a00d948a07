"""Engines and ranks that are not there, or are not who the registry says: an error that names them,
and nothing else happens.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from pdlaunch.protocol.control import PairFailed, PairReady
from pdlaunch.protocol.transfer import LeaseEnded
from tests.transfer.pull_world import HolderRank, World
from tests.transfer.rank_process import grant, pull


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def refused(world: World, holder: HolderRank, **remote: str) -> str:
    """Why a pull that names an engine by ``remote`` ends before it has asked anybody."""
    num_sent = len(holder.channel.sent)
    before = world.kv_cache.clone()
    world.pulls.start(pull("stray", msgspec.structs.replace(holder.remote("r"), **remote), [1, 2]))
    finished = world.finished()
    assert (finished.ok, finished.in_flight, finished.num_bytes) == (False, False, 0)
    assert len(world.pulls) == 0
    assert len(holder.channel.sent) == num_sent
    assert world.kv_cache.equal(before)
    return finished.error


def pulls_well(world: World, holders: list[HolderRank]) -> None:
    for holder in holders:
        holder.holder.grant(grant("well", [4, 5]))
    world.pulls.start(pull("p", holders[0].remote("well"), [1, 2]))
    world.turn()
    finished = world.finished()
    assert finished.ok, finished.error
    assert all(
        holder.ended() == [LeaseEnded(lease_id="well", reason="pulled")] for holder in holders
    )


def test_an_engine_that_is_not_in_the_registry(world: World) -> None:
    holder = world.connect()
    assert f"no engine with engine_id {'e' * 32} is in the registry" in refused(
        world, holder, engine_id="e" * 32
    )
    pulls_well(world, [holder])


def test_a_rank_that_is_not_in_the_registry(world: World) -> None:
    """Two of three ranks are known: pulls need all, and work once the third is there."""
    holders = world.connect_group(3)
    world.peers.update([holder.entry() for holder in holders[:2]])
    assert f"tp_rank 2 of engine_id {'1' * 32} is not in the registry" in refused(world, holders[0])
    world.peers.update([holder.entry() for holder in holders])
    world.turn()
    pulls_well(world, holders)


@pytest.mark.parametrize(
    ("field", "shown", "wanted"),
    [
        (
            "tp_rank",
            0,
            (
                "tp_rank: the registry shows 0 for prefill-0/rank-1 at fake://11, prefill-0/rank-1 "
                "answers with 1"
            ),
        ),
        (
            "tp_size",
            1,
            (
                "tp_size: the registry shows 1 for prefill-0/rank-1 at fake://11, prefill-0/rank-1 "
                "answers with 3"
            ),
        ),
        (
            "incarnation",
            2,
            (
                "incarnation: the registry shows 2 for prefill-0/rank-1 at fake://11, "
                "prefill-0/rank-1 answers with 1"
            ),
        ),
    ],
)
def test_who_answers_is_not_who_the_registry_names(
    world: World, field: str, shown: int, wanted: str
) -> None:
    """Nothing is read of it, and once the registry is right the pair is too."""
    holders = [world.add(tp_rank=tp_rank, tp_size=3) for tp_rank in range(3)]
    others = [holder.entry() for holder in (holders[0], holders[2])]
    world.peers.update([*others, msgspec.structs.replace(holders[1].entry(), **{field: shown})])
    world.turn()
    errors = [report.error for report in world.reports if isinstance(report, PairFailed)]
    assert len(errors) == 1
    assert wanted in errors[0]
    assert "prefill-0/rank-1#1" not in world.connector.added
    world.peers.update([holder.entry() for holder in holders])
    world.turn()
    pulls_well(world, holders)


def test_a_rank_that_is_away_for_hours_is_found_when_it_comes(world: World) -> None:
    absent = HolderRank(world.clock, world.fabric)
    world.peers.update([absent.entry()])
    while len(world.reports) < 1100:
        world.clock.now += 5.0
        world.turn(1)
    world.holders[absent.entry().address.side_channel] = absent
    world.clock.now += 5.0
    world.turn()
    assert isinstance(world.reports[-1], PairReady)
    pulls_well(world, [absent])
