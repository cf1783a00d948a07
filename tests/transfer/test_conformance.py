"""Requirements on every connector: real processes, real libraries on CPU memory, real sockets."""

import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pdlaunch.protocol.transfer import LeaseEnded, PullDrained, PullFinished
from pdlaunch.transfer.proof import UNPROVEN
from tests.faulty.transfers import Fault, FaultPlan
from tests.mooncake import mooncake_problem
from tests.transfer.conftest import Start, starting
from tests.transfer.rank_process import RankHandle, cancel, grant, pull

pytestmark = pytest.mark.processes

# Connector, or path of the connector nixl -> its name in the handshake.
PATHS = {
    "nixl": "nixl/UCX",
    "p2p": "p2p/memfd",
    "mooncake": "mooncake/tcp",
    "file": "file/safetensors",
}


@pytest.fixture(scope="module", params=list(PATHS))
def settings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    if request.param == "mooncake" and (problem := mooncake_problem()):
        pytest.skip(f"mooncake: {problem}")
    if request.param == "file":
        return {"connector": "file", "file": {"directory": str(tmp_path_factory.mktemp("kv"))}}
    if request.param in ("nixl", "p2p"):
        return {"connector": "nixl", "nixl": {"path": request.param}}
    return {"connector": request.param}


@pytest.fixture(scope="module")
def pair(settings: dict[str, Any]) -> Iterator[tuple[RankHandle, RankHandle]]:
    with starting() as start:
        holder, puller = (start(role, transfer=settings) for role in ("prefill", "decode"))
        (ready,) = puller.connect(holder)
        assert (ready.local, ready.peer, ready.peer_incarnation, ready.path.split()[0]) == (
            "decode-0/rank-0",
            "prefill-0/rank-0",
            1,
            PATHS[settings.get("nixl", {}).get("path", settings["connector"])],
        )
        assert ready.gigabytes_per_s > 0
        yield holder, puller


@pytest.mark.parametrize("skip", [0, 1])
def test_bytes_are_equal_other_blocks_are_not_touched_and_the_lease_ends(pair, skip):
    """The blocks are scattered, neighbours on both sides (which connectors may merge), and
    neighbours on one side.
    """
    holder, puller = pair
    theirs, ours = [3, 4, 5, 1, 15, 16, 20, 22], [9, 10, 11, 2, 7, 6, 24, 25]
    others = sorted(set(range(32)) - set(ours))
    before = puller.blocks(others)
    holder.submit(grant("r", [7, 8][:skip] + theirs))
    puller.submit(pull("p", holder.remote("r"), ours, skip=skip))
    finished = puller.event(PullFinished)
    assert finished.ok, finished.error
    assert finished.num_bytes == len(ours) * holder.blocks([0]).nbytes
    np.testing.assert_array_equal(puller.blocks(ours), holder.blocks(theirs))
    np.testing.assert_array_equal(puller.blocks(others), before)
    assert holder.event(LeaseEnded) == LeaseEnded(lease_id="r", reason="pulled")


def test_a_byte_that_changed_after_the_grant_is_found(pair):
    holder, puller = pair
    holder.submit(grant("bad", [10, 11, 12], num_readers=2))
    puller.submit(pull("first", holder.remote("bad"), [24], skip=2))
    assert puller.event(PullFinished).ok, "the checksums are made before the byte changes"
    holder.call("flip", 11, 2)
    puller.submit(pull("bad", holder.remote("bad"), [24, 25, 26]))
    finished = puller.event(PullFinished)
    assert not finished.ok
    assert finished.counts[UNPROVEN]
    assert not finished.in_flight
    assert "KV head 2 differs: block 11 there, block 25 here" in finished.error
    assert holder.event(LeaseEnded) == LeaseEnded(lease_id="bad", reason="pulled")
    holder.call("flip", 11, 2)


def test_a_restarted_holder_is_found_again(start: Start, settings):
    holder, puller = (start(role, transfer=settings) for role in ("prefill", "decode"))
    puller.connect(holder)
    holder.submit(grant("old", [3, 1]))
    holder.blocks([3])
    old = holder.remote("old")
    holder.stop()
    again = start("prefill", transfer=settings, engine_id="e" * 32, incarnation=2)
    assert puller.connect(again)[0].peer_incarnation == 2
    puller.pull_from(again, "new")
    puller.submit(pull("old", old, [1, 2]))
    assert not puller.event(PullFinished).ok


def test_different_tp_sizes_in_both_directions(start: Start, settings):
    """Every puller rank reads its heads from the ranks that hold them, and every lease ends.

    The first READ of one of three pullers returns a wrong byte: only this puller reads again, under
    the lease that the others have ended.
    """
    faults = one_corrupt_read("decode-0/rank-1#1", "decode-0/rank-0#1", "decode-0/rank-2#1")
    settings = settings | {"pull_attempts": 2}
    one = [start("prefill", transfer=settings)]
    three = [
        start("decode", tp_size=3, tp_rank=tp_rank, num_heads=1, transfer=settings, faults=faults)
        for tp_rank in range(3)
    ]
    registry = [rank.entry() for rank in (*one, *three)]
    for rank in (*one, *three):
        rank.call("registry", registry)
    for holders, pullers, num_retries in ((one, three, [0, 1, 0]), (three, one, [0])):
        for holder in holders:
            holder.submit(grant("r", [3, 8, 5]))
        for puller in pullers:
            puller.submit(pull("p", holders[0].remote("r"), [30, 2, 17]))
        for puller, retries in zip(pullers, num_retries, strict=True):
            finished = puller.event(PullFinished)
            assert finished.ok, finished.error
            assert finished.counts["kv_pull_retries"] == retries
        there = np.concatenate([holder.blocks([3, 8, 5]) for holder in holders], axis=1)
        here = np.concatenate([puller.blocks([30, 2, 17]) for puller in pullers], axis=1)
        np.testing.assert_array_equal(here, there)
        for holder in holders:
            assert holder.event(LeaseEnded).reason == "pulled"


def one_corrupt_read(agent: str, *others: str) -> FaultPlan:
    """Faults with which the first READ of ``agent`` returns a wrong byte. Its second READ, and the
    first READs of the others, are right.
    """
    plans = (FaultPlan(seed=seed, lease_rate=0) for seed in itertools.count())
    return next(
        plan
        for plan in plans
        if plan.of_read(agent, 1)[0] is Fault.CORRUPT
        and plan.of_read(agent, 2)[0] is None
        and all(plan.of_read(other, 1)[0] is None for other in others)
    )


BLOCKS = list(range(60))


@pytest.fixture
def stopped(start: Start, settings: dict[str, Any]) -> tuple[RankHandle, RankHandle]:
    """A pair whose holder is stopped in the middle of a READ. The READ needs the holder's process
    (no CMA) or is held, and its blocks are large.
    """
    options = {"environment": (("UCX_TLS", "posix,self"),), "transfer": settings}
    options |= {"head_dim": 64, "num_layers": 8, "num_blocks": 64}
    holder, puller = (start(role, **options) for role in ("prefill", "decode"))
    puller.connect(holder)
    holder.submit(grant("r", BLOCKS[::-1]))
    puller.call("interrupt", "stop", holder.process.pid)
    puller.submit(pull("p", holder.remote("r"), BLOCKS))
    puller.wait("posted")
    return holder, puller


def test_a_pull_from_a_stopped_holder_is_quarantined_until_its_bytes_have_landed(stopped):
    """A READ cannot be cancelled: after SIGCONT its bytes still arrive. Only then the blocks are
    free.
    """
    holder, puller = stopped
    puller.submit(cancel("p"))
    finished = puller.event(PullFinished)
    assert (finished.ok, finished.error, finished.in_flight) == (False, "cancelled", True)
    os.kill(holder.process.pid, signal.SIGCONT)
    puller.call("go_on_reading")
    assert puller.event(PullDrained) == PullDrained(pull_id="p")
    np.testing.assert_array_equal(puller.blocks(BLOCKS), holder.blocks(BLOCKS[::-1]))
    puller.submit(pull("next", holder.remote("r"), BLOCKS[:2]))
    assert not puller.event(PullFinished).ok, "the cancelled pull gave its share of the lease back"


def test_a_holder_killed_in_the_middle_drains_the_pull(stopped, settings):
    if settings.get("nixl", {}).get("path") == "nixl":
        pytest.skip(
            "nobody tells a READ that needs its holder of the death; see test_nixl_deaths.py"
        )
    holder, puller = stopped
    puller.call("registry", [])
    finished = puller.event(PullFinished)
    assert (finished.ok, finished.in_flight) == (False, True)
    assert "incarnation 1 of prefill-0/rank-0 is gone" in finished.error
    holder.stop()
    puller.call("go_on_reading")
    assert puller.event(PullDrained).pull_id == "p"
