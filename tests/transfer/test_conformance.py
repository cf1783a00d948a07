"""What every connector must do: real processes, real libraries over CPU memory, real sockets."""

from __future__ import annotations

import functools
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zmq

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.protocol.control import PairReady
from pdlaunch.protocol.side_channel import (
    PushEnded,
    Refused,
    to_decode_side,
    to_prefill_side,
)
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext, new_launch_keys
from pdlaunch.protocol.transfer import LeaseEnded, PullDrained, PullFinished
from pdlaunch.transfer.connectors.faults import Fault, FaultPlan
from tests.mooncake import mooncake_problem
from tests.transfer.all_questions import questions_for
from tests.transfer.fakes import spec_of
from tests.transfer.rank_process import RankHandle, RankOptions, cancel, grant, pull

pytestmark = pytest.mark.processes

# Connectors, or paths of NIXL's, and what the handshake says of them.
PATHS = {
    "nixl": "nixl/UCX",
    "p2p": "p2p/memfd",
    "mooncake": "mooncake/tcp",
    "file": "file/safetensors",
}


@pytest.fixture(scope="module")
def keys() -> LaunchKeys:
    return new_launch_keys()


@pytest.fixture(scope="module", params=list(PATHS))
def settings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """``kv_transfer`` of a launch with the connector under test."""
    if request.param == "mooncake" and (problem := mooncake_problem()):
        pytest.skip(f"mooncake: {problem}")
    if request.param == "file":
        return {"connector": "file", "file": {"directory": str(tmp_path_factory.mktemp("kv"))}}
    if request.param in ("nixl", "p2p"):
        return {"connector": "nixl", "nixl": {"path": request.param}}
    return {"connector": request.param}


@pytest.fixture(scope="module")
def make_spec(settings: dict[str, Any]) -> Callable[..., EngineSpec]:
    return functools.partial(spec_of, **settings)


@pytest.fixture(scope="module")
def holder_options(keys: LaunchKeys, make_spec: Callable[..., EngineSpec]) -> RankOptions:
    return RankOptions(spec=make_spec("prefill", name="prefill-0"), keys=keys, engine_id="a" * 32)


@pytest.fixture(scope="module")
def puller_options(keys: LaunchKeys, make_spec: Callable[..., EngineSpec]) -> RankOptions:
    return RankOptions(spec=make_spec("decode", name="decode-0"), keys=keys, engine_id="b" * 32)


@pytest.fixture(scope="module")
def pair(
    holder_options: RankOptions, puller_options: RankOptions, settings: dict[str, Any]
) -> Iterator[tuple[RankHandle, RankHandle]]:
    """A holder and a puller that have shaken hands."""
    holder, puller = RankHandle(holder_options), RankHandle(puller_options)
    try:
        puller.call("registry", [holder.entry(), puller.entry()])
        ready = puller.report(PairReady)
        assert (ready.local, ready.peer, ready.peer_incarnation, ready.path) == (
            "decode-0/rank-0",
            "prefill-0/rank-0",
            1,
            PATHS[settings.get("nixl", {}).get("path", settings["connector"])],
        )
        assert ready.gigabytes_per_s > 0
        yield holder, puller
    finally:
        holder.stop()
        puller.stop()


def test_bytes_are_equal_and_the_lease_ends(pair):
    """Of scattered blocks, of runs that are neighbours on both sides, which connectors may merge,
    and of neighbours on one side.
    """
    holder, puller = pair
    theirs, ours = [3, 4, 5, 1, 15, 16, 20, 22], [9, 10, 11, 2, 7, 6, 24, 25]
    holder.submit(grant("r", theirs))
    puller.submit(pull("p", holder.remote("r"), ours))
    finished = puller.event(PullFinished)
    assert finished.ok, finished.error
    assert finished.num_bytes == len(ours) * holder.blocks([0]).nbytes
    np.testing.assert_array_equal(puller.blocks(ours), holder.blocks(theirs))
    assert holder.event(LeaseEnded) == LeaseEnded(lease_id="r", reason="pulled")


def test_skipped_blocks_are_not_touched(pair):
    holder, puller = pair
    before = puller.blocks([20, 21])
    holder.submit(grant("skip", [7, 8, 9]))
    puller.submit(pull("skip", holder.remote("skip"), [22, 23], skip=1))
    assert puller.event(PullFinished).ok
    np.testing.assert_array_equal(puller.blocks([22, 23]), holder.blocks([8, 9]))
    np.testing.assert_array_equal(puller.blocks([20, 21]), before)
    assert holder.event(LeaseEnded).reason == "pulled"


def test_a_byte_that_changed_after_the_grant_is_found(pair):
    holder, puller = pair
    holder.submit(grant("bad", [10, 11, 12], num_readers=2))
    puller.submit(pull("first", holder.remote("bad"), [24], skip=2))
    assert puller.event(PullFinished).ok, "the checksums are made before the byte changes"
    holder.call("flip", 11, 2)
    puller.submit(pull("bad", holder.remote("bad"), [24, 25, 26]))
    finished = puller.event(PullFinished)
    assert not finished.ok
    assert finished.verification_failed
    assert not finished.in_flight
    assert "KV head 2 differs: block 11 there, block 25 here" in finished.error
    assert holder.event(LeaseEnded) == LeaseEnded(lease_id="bad", reason="pulled")
    holder.call("flip", 11, 2)


def test_questions_for_an_engine_that_does_not_exist_harm_nothing(pair, keys):
    """Asked by a process of the launch, at the holder and at the puller, while a lease lives."""
    holder, puller = pair
    holder.submit(grant("kept", [13, 14]))
    before = [rank.call("digest", False) for rank in pair]
    context = SecureContext(keys)
    try:
        for rank in pair:
            socket = context.connect(zmq.DEALER, rank.endpoint)
            socket.rcvtimeo = 60_000
            for question in questions_for("c" * 32):
                socket.send(to_prefill_side.encode(question))
                answer = to_decode_side.decode(socket.recv())
                assert isinstance(answer, Refused | PushEnded)
                assert answer.call_id == question.call_id
                reason = answer.reason if isinstance(answer, Refused) else answer.error
                own = f"it belongs to engine_id {rank.options.engine_id}, not to {'c' * 32}"
                assert reason == f"{rank.options.name}: {own}"
            socket.close()
    finally:
        context.close()
    assert [rank.call("digest", False) for rank in pair] == before
    puller.submit(pull("kept", holder.remote("kept"), [28, 29]))
    finished = puller.event(PullFinished)
    assert finished.ok, finished.error
    np.testing.assert_array_equal(puller.blocks([28, 29]), holder.blocks([13, 14]))
    assert holder.event(LeaseEnded) == LeaseEnded(lease_id="kept", reason="pulled")


def test_nobody_from_another_host_can_connect(pair):
    for rank in pair:
        assert rank.call("open_listeners") == []


def test_a_rank_listens_on_its_side_channel_alone(pair, settings):
    """And on what its connector cannot do without: Mooncake's two ports (PD409), the Unix socket
    that hands memory over.
    """
    for rank in pair:
        tcp, unix = rank.call("listening")
        side_channel = int(rank.endpoint.rpartition(":")[2])
        assert side_channel in tcp
        assert len(tcp) == (3 if settings["connector"] == "mooncake" else 1)
        assert len(unix) == (settings.get("nixl", {}).get("path") == "p2p")
        assert all(path.startswith("@") for path in unix)


def test_shared_memory_is_open_to_the_same_user_only(pair):
    for rank in pair:
        modes, num_sysv = rank.call("shared_memory")
        assert modes <= {0o600}
        assert num_sysv == 0


def test_a_restarted_holder_is_found_again(holder_options, puller_options, settings):
    puller, first = RankHandle(puller_options), RankHandle(holder_options)
    second = RankHandle(replace(holder_options, engine_id="e" * 32, incarnation=2))
    try:
        puller.call("registry", [first.entry()])
        assert puller.report(PairReady).peer_incarnation == 1
        first.submit(grant("r", [1]))
        first.stop()
        puller.submit(pull("dead", first.remote("r"), [1], timeout_s=1.0))
        assert not puller.event(PullFinished).ok
        puller.call("registry", [second.entry()])
        ready = puller.report(PairReady)
        assert ready.peer_incarnation == 2
        second.submit(grant("r", [5, 6]))
        puller.submit(pull("again", second.remote("r"), [7, 8]))
        assert puller.event(PullFinished).ok
        np.testing.assert_array_equal(puller.blocks([7, 8]), second.blocks([5, 6]))
        puller.submit(pull("old", first.remote("r"), [1]))
        assert not puller.event(PullFinished).ok
    finally:
        for rank in (puller, first, second):
            rank.stop()


def test_different_tp_sizes_in_both_directions(keys, settings):
    """Every puller rank gets the heads that it holds, from the ranks that hold them, and every
    lease ends.

    The first READ of one of three pullers brings a wrong byte: it alone reads again, under the
    lease that the others have ended.
    """

    def ranks(role: str, tp_size: int, engine_id: str, **kv_transfer: Any) -> list[RankHandle]:
        spec = spec_of(role, name=f"{role}-0", tp_size=tp_size, **{**settings, **kv_transfer})
        options = [
            RankOptions(
                spec,
                keys,
                engine_id,
                tp_rank=tp_rank,
                num_heads=3 // tp_size,
            )
            for tp_rank in range(tp_size)
        ]
        return [RankHandle(each) for each in options]

    faults = one_corrupt_read("decode-0/rank-1#1", "decode-0/rank-0#1", "decode-0/rank-2#1")
    faults = faults.model_copy(update={"inner": settings["connector"]})
    one, three = (
        ranks("prefill", 1, "a" * 32),
        ranks("decode", 3, "b" * 32, connector="faulty", faulty=faults.model_dump()),
    )
    try:
        registry = [rank.entry() for rank in (*one, *three)]
        for rank in (*one, *three):
            rank.call("registry", registry)
        for holders, pullers, num_retries in ((one, three, [0, 1, 0]), (three, one, [0])):
            for holder in holders:
                holder.submit(grant("r", [3, 8, 5]))
            for puller in pullers:
                puller.submit(pull("p", holders[0].remote("r"), [30, 2, 17], num_attempts=2))
            for puller, retries in zip(pullers, num_retries, strict=True):
                finished = puller.event(PullFinished)
                assert finished.ok, finished.error
                assert finished.num_retries == retries
            there = np.concatenate([holder.blocks([3, 8, 5]) for holder in holders], axis=1)
            here = np.concatenate([puller.blocks([30, 2, 17]) for puller in pullers], axis=1)
            np.testing.assert_array_equal(here, there)
            for holder in holders:
                assert holder.event(LeaseEnded).reason == "pulled"
    finally:
        for rank in (*one, *three):
            rank.stop()


def one_corrupt_read(agent: str, *others: str) -> FaultPlan:
    """The first READ of ``agent`` brings a wrong byte; its second, and the first of the others, are
    right.
    """
    plans = (FaultPlan(seed=seed, probe_rate=0, lease_rate=0) for seed in itertools.count())
    return next(
        plan
        for plan in plans
        if plan.of_read(agent, 1)[0] is Fault.CORRUPT
        and plan.of_read(agent, 2)[0] is None
        and all(plan.of_read(other, 1)[0] is None for other in others)
    )


def test_a_pull_that_comes_to_some_ranks_before_their_leases(keys, make_spec):
    """Rank 0 of a TP group answers when it has sent the grants to the others: these must not refuse
    who is faster.
    """
    prefill, decode = (
        make_spec("prefill", name="prefill-0", tp_size=3),
        make_spec("decode", name="decode-0"),
    )
    holders = [
        RankHandle(
            RankOptions(spec=prefill, keys=keys, engine_id="a" * 32, tp_rank=tp_rank, num_heads=1)
        )
        for tp_rank in range(3)
    ]
    puller = RankHandle(RankOptions(spec=decode, keys=keys, engine_id="b" * 32))
    try:
        puller.call("registry", [rank.entry() for rank in (*holders, puller)])
        pairs = [puller.report(PairReady) for _ in holders]
        assert {(pair.peer, pair.num_peers) for pair in pairs} == {
            (f"prefill-0/rank-{tp_rank}", 3) for tp_rank in range(3)
        }
        for name in ("r", "s", "t"):
            holders[0].submit(grant(name, [3, 8, 5]))
            puller.submit(pull(name, holders[0].remote(name), [30, 2, 17]))
            for holder in holders[1:]:
                holder.submit(grant(name, [3, 8, 5]))
            finished = puller.event(PullFinished)
            assert finished.ok, finished.error
            for holder in holders:
                assert holder.event(LeaseEnded) == LeaseEnded(lease_id=name, reason="pulled")
    finally:
        for rank in (*holders, puller):
            rank.stop()


@pytest.fixture
def stoppable(
    holder_options: RankOptions, puller_options: RankOptions
) -> Iterator[tuple[RankHandle, RankHandle]]:
    """A pair whose READs need the holder to run (no CMA) or can be held, and blocks large enough to
    be in the middle of.
    """
    options = {
        "environment": (("UCX_TLS", "posix,self"),),
        "head_dim": 64,
        "num_layers": 8,
        "num_blocks": 64,
    }
    holder = RankHandle(replace(holder_options, **options))
    puller = RankHandle(replace(puller_options, **options))
    try:
        puller.call("registry", [holder.entry()])
        puller.report(PairReady)
        yield holder, puller
    finally:
        holder.stop()
        puller.stop()


def test_a_pull_from_a_stopped_holder_is_quarantined_until_its_bytes_have_landed(stoppable):
    """No READ can be taken back: after SIGCONT its bytes still arrive, and only then the blocks are
    free.
    """
    holder, puller = stoppable
    blocks = list(range(60))
    holder.submit(grant("r", blocks[::-1], lease_s=60))
    before = puller.blocks(blocks)
    stop_during_read(holder, puller, "p", blocks)
    puller.submit(cancel("p"))
    finished = puller.event(PullFinished)
    assert not finished.ok
    assert finished.error == "cancelled"
    os.kill(holder.process.pid, signal.SIGCONT)
    puller.call("go_on_reading")
    assert finished.in_flight
    assert puller.event(PullDrained) == PullDrained(pull_id="p")
    landed = puller.blocks(blocks)
    assert not np.array_equal(landed, before)
    puller.submit(pull("next", holder.remote("r"), blocks[:2]))
    assert not puller.event(PullFinished).ok, "the cancelled pull gave its share of the lease back"


def test_a_holder_killed_in_the_middle_drains_the_pull(stoppable, settings):
    if settings.get("nixl", {}).get("path") == "nixl":
        pytest.skip(
            "nobody tells a READ that needs its holder of the death; see test_nixl_deaths.py"
        )
    holder, puller = stoppable
    blocks = list(range(60))
    holder.submit(grant("r", blocks[::-1], lease_s=60))
    stop_during_read(holder, puller, "p", blocks)
    puller.call("registry", [])
    finished = puller.event(PullFinished)
    assert not finished.ok
    assert finished.in_flight
    assert "incarnation 1 of prefill-0/rank-0 is gone" in finished.error
    holder.stop()
    puller.call("go_on_reading")
    assert puller.event(PullDrained).pull_id == "p"


def stop_during_read(
    holder: RankHandle, puller: RankHandle, pull_id: str, blocks: list[int]
) -> None:
    """Returns when the puller has posted its READ to a holder that is stopped."""
    puller.call("interrupt", "stop", holder.process.pid)
    puller.submit(pull(pull_id, holder.remote("r"), blocks))
    puller.wait("posted")
