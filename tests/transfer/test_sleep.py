"""A rank lets go of its peers and memory, and both sides shake hands anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch
import zmq

from pdlaunch.errors import TransferError
from pdlaunch.protocol.control import PairReady
from pdlaunch.protocol.side_channel import PullBegin, Refused, to_decode_side, to_prefill_side
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from pdlaunch.protocol.transfer import LeaseEnded
from tests.transfer.fakes import Fabric, FakeConnector
from tests.transfer.rank_process import grant, pull
from tests.transfer.test_thread import ENGINE_IDS, Rank, remote

TIMEOUT_S = 60.0


class MappedConnector(FakeConnector):
    """Knows whether its memory is registered."""

    registered = False

    def open(self, memory):  # type: ignore[no-untyped-def]
        assert not self.registered
        super().open(memory)
        self.registered = True

    def close(self) -> None:
        super().close()
        self.registered = False


@pytest.fixture
def context() -> Iterator[SecureContext]:
    context = SecureContext(new_launch_keys())
    yield context
    context.close()


@pytest.fixture
def fabric() -> Fabric:
    return Fabric()


@pytest.fixture
def start(
    context: SecureContext, fabric: Fabric
) -> Iterator[Callable[[str], tuple[Rank, MappedConnector]]]:
    started: list[Rank] = []

    def start(role: str) -> tuple[Rank, MappedConnector]:
        connector = MappedConnector(f"{role}-0/rank-0#1", fabric)
        started.append(Rank(context, role, connector))
        started[-1].transfer.wait_started(TIMEOUT_S)
        return started[-1], connector

    yield start
    fabric.kill()
    for rank in started:
        rank.transfer.close(timeout_s=60)


def pull_once(holder: Rank, puller: Rank, name: str) -> None:
    holder.transfer.submit([grant(name, [4, 5])])
    puller.transfer.submit([pull(name, remote(name), [1, 2])])
    (finished,) = puller.events()
    assert finished.ok, finished.error
    assert torch.equal(puller.kv_cache[[1, 2]], holder.kv_cache[[4, 5]])
    assert holder.events() == [LeaseEnded(lease_id=name, reason="pulled")]


def connect(holder: Rank, puller: Rank, *asleep: Rank) -> None:
    entries = [
        msgspec.structs.replace(rank.entry(), state="sleeping" if rank in asleep else "ready")
        for rank in (holder, puller)
    ]
    for rank in (holder, puller):
        rank.transfer.update_registry(entries)


def await_connected(rank: Rank) -> None:
    while not rank.transfer.connected:
        rank._wakes.get(timeout=TIMEOUT_S)


@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_pulls_work_again_after_either_side_has_slept(
    who: str, start: Callable[[str], tuple[Rank, MappedConnector]]
) -> None:
    (holder, holder_memory), (puller, puller_memory) = start("prefill"), start("decode")
    sleeper, memory = (holder, holder_memory) if who == "prefill" else (puller, puller_memory)
    connect(holder, puller)
    assert isinstance(puller.reports.get(timeout=TIMEOUT_S), PairReady)
    for cycle in range(3):
        pull_once(holder, puller, f"request-{cycle}")
        sleeper.transfer.suspend(TIMEOUT_S)
        assert not memory.registered
        assert not puller_memory.peers or who == "prefill"
        connect(holder, puller, sleeper)
        sleeper.kv_cache.copy_(torch.randn_like(sleeper.kv_cache))
        sleeper.transfer.resume(TIMEOUT_S)
        assert memory.registered
        connect(holder, puller)
        await_connected(sleeper)
        assert isinstance(puller.reports.get(timeout=TIMEOUT_S), PairReady)
    pull_once(holder, puller, "last")
    assert len(puller_memory.added) == 4


def test_a_lease_keeps_the_rank_awake(start: Callable[[str], tuple[Rank, MappedConnector]]) -> None:
    (holder, memory), (puller, _) = start("prefill"), start("decode")
    connect(holder, puller)
    assert isinstance(puller.reports.get(timeout=TIMEOUT_S), PairReady)
    holder.transfer.submit([grant("r", [4, 5])])
    with pytest.raises(TransferError, match="has not ended"):
        holder.transfer.suspend(0.05)
    assert memory.registered
    puller.transfer.submit([pull("p", remote("r"), [1, 2])])
    (finished,) = puller.events()
    assert finished.ok
    holder.transfer.suspend(TIMEOUT_S)
    assert not memory.registered


def test_a_read_that_may_still_write_keeps_the_rank_awake(
    start: Callable[[str], tuple[Rank, MappedConnector]], fabric: Fabric
) -> None:
    (holder, _), (puller, memory) = start("prefill"), start("decode")
    connect(holder, puller)
    assert isinstance(puller.reports.get(timeout=TIMEOUT_S), PairReady)
    fabric.stalled = True
    holder.transfer.submit([grant("r", [4, 5])])
    puller.transfer.submit([pull("p", remote("r"), [1, 2])])
    with pytest.raises(TransferError, match="has not ended"):
        puller.transfer.suspend(0.2)
    assert memory.registered
    fabric.land()
    (finished,) = puller.events()
    assert finished.ok
    puller.transfer.suspend(TIMEOUT_S)
    assert not memory.registered


def test_a_sleeping_rank_refuses_and_says_why(
    start: Callable[[str], tuple[Rank, MappedConnector]], context: SecureContext
) -> None:
    holder, _ = start("prefill")
    holder.transfer.suspend(TIMEOUT_S)
    socket = context.connect(zmq.DEALER, holder.transfer.endpoint)
    socket.rcvtimeo = 60_000
    socket.send(
        to_prefill_side.encode(
            PullBegin(
                call_id=1,
                engine_id=ENGINE_IDS["prefill"],
                lease_id="r",
                reader="x",
                num_decode_ranks=1,
            )
        )
    )
    answer = to_decode_side.decode(socket.recv())
    assert isinstance(answer, Refused)
    assert answer.reason == "prefill-0/rank-0 is asleep"
    socket.close()
    holder.transfer.resume(TIMEOUT_S)
    await_connected(holder)
