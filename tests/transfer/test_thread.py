"""The transfer thread with real sockets and a fake connector: pulls, strangers, and a rank that
releases its peers and memory for sleep and shakes hands again.
"""

import os
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zmq

from pdlaunch.engine.memory.kv_memory import PrivateKVMemory
from pdlaunch.errors import TransferError
from pdlaunch.protocol.control import Entry, PairReady
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.side_channel import (
    PullBegin,
    Refused,
    ToDecodeSide,
    to_decode_side,
    to_prefill_side,
)
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from pdlaunch.protocol.transfer import LeaseEnded, PullFinished
from pdlaunch.transfer.connectors.connector import Connector, LocalMemory
from pdlaunch.transfer.handshake import RankIdentity, native_setup
from pdlaunch.transfer.thread import TransferThread
from tests.e2e.waiting import await_true
from tests.transfer.fakes import (
    Fabric,
    FakeConnector,
    entry_of,
    layout_of,
    random_cache,
    remote_of,
    spec_of,
)
from tests.transfer.rank_process import grant, pull

ENGINE_IDS = {"prefill": "a" * 32, "decode": "b" * 32}
TIMEOUT_S = 60.0


class Rank:
    """A transfer thread, with the engine's side of its interface."""

    def __init__(
        self,
        context: SecureContext,
        role: str,
        fabric: Fabric,
        *,
        connector: Connector | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        layout = layout_of()
        self.kv_cache = random_cache(layout, 16, seed=len(role))
        self.name, self.role = f"{role}-0/rank-0", role
        self.connector: Any = connector or FakeConnector(f"{self.name}#1", fabric)
        self.reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wakes = wakes = queue.SimpleQueue[None]()
        self.transfer = TransferThread(
            native_setup(
                spec_of(role, name=f"{role}-0"),
                RankIdentity(self.name, f"{role}-0", ENGINE_IDS[role], 1, 0, 1),
                self.kv_cache,
                layout,
                kv_memory=PrivateKVMemory(),
                model_digest="m",
                total_kv_heads=3,
                first_kv_head=0,
                connector=self.connector,
                context=context,
                wake=lambda: wakes.put(None),
                report=self.reports.put,
                clock=clock,
            )
        )

    def entry(self, **changes: Any) -> Entry:
        fields = {"state": "ready"} | changes
        engine_id, endpoint = ENGINE_IDS[self.role], self.transfer.endpoint
        return entry_of(f"{self.role}-0", self.role, engine_id, endpoint, **fields)

    @property
    def is_registered(self) -> bool:
        return self.connector.agent_name in self.connector.fabric.agents

    def events(self) -> list[Any]:
        while True:
            self._wakes.get(timeout=TIMEOUT_S)
            if events := self.transfer.take_events():
                return events

    def close(self) -> None:
        self.transfer.close(timeout_s=TIMEOUT_S)


def remote(lease_id: str) -> RemoteKV:
    return remote_of(ENGINE_IDS["prefill"], lease_id)


def begin_pull(holder: Rank, puller: Rank, name: str) -> None:
    holder.transfer.submit([grant(name, [4, 5])])
    puller.transfer.submit([pull(name, remote(name), [1, 2])])


def pull_once(holder: Rank, puller: Rank, name: str) -> None:
    begin_pull(holder, puller, name)
    (finished,) = puller.events()
    assert isinstance(finished, PullFinished)
    assert finished.ok, finished.error
    assert torch.equal(puller.kv_cache[[1, 2]], holder.kv_cache[[4, 5]])
    assert holder.events() == [LeaseEnded(lease_id=name, reason="pulled")]


def tell(*ranks: Rank, asleep: Rank | None = None) -> None:
    """Send a registry with these ranks to all of them."""
    entries = [rank.entry(state="sleeping" if rank is asleep else "ready") for rank in ranks]
    for rank in ranks:
        rank.transfer.update_registry(entries)


def connected(context: SecureContext, fabric: Fabric, **options: Any) -> tuple[Rank, Rank]:
    holder, puller = (Rank(context, role, fabric, **options) for role in ("prefill", "decode"))
    tell(holder, puller)
    assert isinstance(puller.reports.get(timeout=TIMEOUT_S), PairReady)
    return holder, puller


@pytest.fixture
def fabric() -> Fabric:
    return Fabric()


@pytest.fixture
def holder(context: SecureContext, fabric: Fabric) -> Iterator[Rank]:
    rank = Rank(context, "prefill", fabric)
    rank.transfer.wait_started(TIMEOUT_S)
    yield rank
    rank.close()


@pytest.fixture
def pair(context: SecureContext, fabric: Fabric) -> Iterator[tuple[Rank, Rank]]:
    ranks = connected(context, fabric)
    yield ranks
    fabric.kill()
    for rank in ranks:
        rank.close()


class Asker:
    """A client of a rank's side channel: a process of the launch, or a stranger."""

    def __init__(self, context: SecureContext, rank: Rank) -> None:
        self.socket = context.connect(zmq.DEALER, rank.transfer.endpoint)
        self.socket.rcvtimeo = 60_000

    def begin(self, engine_id: str = ENGINE_IDS["prefill"]) -> bytes:
        question = PullBegin(
            call_id=1, engine_id=engine_id, lease_id="r", reader="x", num_decode_ranks=1
        )
        return to_prefill_side.encode(question)

    def answer(self) -> ToDecodeSide:
        return to_decode_side.decode(self.socket.recv())


def test_hostile_frames_are_refused_and_the_thread_goes_on(holder: Rank, context) -> None:
    asker = Asker(context, holder)
    good = asker.begin("c" * 32)
    hostile = ([b""], [b"\xc1"], [os.urandom(500)], [good[:-3]], [good, good], [b"", good])
    for frames in (*hostile, [b"\x91" * 100_000], [good]):
        asker.socket.send_multipart(frames)
    answer = asker.answer()
    assert isinstance(answer, Refused)
    assert "belongs to engine_id aaaa" in answer.reason
    asker.socket.close()


class BrokenConnector(FakeConnector):
    def open(self, memory: LocalMemory) -> None:
        raise TransferError("no such backend")


def test_a_connector_that_cannot_start_is_told(context, fabric) -> None:
    rank = Rank(context, "prefill", fabric, connector=BrokenConnector("x", fabric))
    with pytest.raises(TransferError, match="the connector cannot start: no such backend"):
        rank.transfer.wait_started(TIMEOUT_S)
    with pytest.raises(TransferError, match="the transfer thread has died: no such backend"):
        rank.events()
    rank.close()
    rank.transfer.submit([grant("r", [1])])


def test_idle_threads_do_not_turn_while_others_pull(context) -> None:
    """Two hundred pulls of another pair take longer than the interval at which READs are polled, so
    a thread that polls would turn. Each turn reads the clock.
    """
    num_calls = [0]

    def clock() -> float:
        num_calls[0] += 1
        return time.monotonic()

    others = SecureContext(new_launch_keys())
    idle, busy = connected(context, Fabric(), clock=clock), connected(others, Fabric())
    pull_once(*idle, "first")
    # In the first round, messages of the last pull may still arrive.
    for number in range(5):
        before = num_calls[0]
        for index in range(200):
            pull_once(*busy, f"r{number}/{index}")
        if num_calls[0] == before:
            break
    else:
        raise AssertionError("the idle threads have turned in every round")
    pull_once(*idle, "last")
    assert num_calls[0] > before
    for rank in (*idle, *busy):
        rank.close()
    others.close()


# Sleep


def test_a_read_that_may_still_write_keeps_the_rank_awake(pair, fabric) -> None:
    holder, puller = pair
    fabric.stalled = True
    begin_pull(holder, puller, "r")
    with pytest.raises(TransferError, match="has not ended"):
        puller.transfer.suspend(0.2)
    assert puller.is_registered
    fabric.land()
    (finished,) = puller.events()
    assert finished.ok
    puller.transfer.suspend(TIMEOUT_S)
    assert not puller.is_registered


def test_a_sleeping_rank_refuses_and_says_why(holder: Rank, context) -> None:
    holder.transfer.suspend(TIMEOUT_S)
    asker = Asker(context, holder)
    asker.socket.send(asker.begin())
    answer = asker.answer()
    assert isinstance(answer, Refused)
    assert answer.reason == "prefill-0/rank-0 is asleep"
    asker.socket.close()
    holder.transfer.resume(TIMEOUT_S)
    await_true(lambda: holder.transfer.connected, "it is awake", TIMEOUT_S)
