"""The transfer thread and its real sockets, over a fake connector."""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zmq
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.engine.memory.kv_memory import PrivateKVMemory
from pdlaunch.errors import ProtocolError, TransferError
from pdlaunch.protocol.control import Address, Entry, PairReady
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.side_channel import (
    PullBegin,
    PullReply,
    Refused,
    to_decode_side,
    to_prefill_side,
)
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from pdlaunch.protocol.transfer import LeaseEnded
from pdlaunch.transfer.connectors.connector import Connector, LocalMemory
from pdlaunch.transfer.handshake import RankIdentity
from pdlaunch.transfer.sides import TransferSetup
from pdlaunch.transfer.thread import TransferThread
from tests.transfer.fakes import Fabric, FakeConnector, layout_of, random_cache, spec_of
from tests.transfer.rank_process import grant, pull

ENGINE_IDS = {"prefill": "a" * 32, "decode": "b" * 32}


class Rank:
    """A transfer thread and the engine's side of it."""

    def __init__(
        self,
        context: SecureContext,
        role: str,
        connector: Connector,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        layout = layout_of()
        self.kv_cache = random_cache(layout, 16, seed=len(role))
        self.role = role
        self.reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wakes = wakes = queue.SimpleQueue[None]()
        self.transfer = TransferThread(
            TransferSetup(
                spec=spec_of(role, name=f"{role}-0"),
                identity=RankIdentity(
                    f"{role}-0/rank-0", f"{role}-0", ENGINE_IDS[role], 1, tp_rank=0, tp_size=1
                ),
                kv_cache=self.kv_cache,
                layout=layout,
                kv_memory=PrivateKVMemory(),
                model_digest="m",
                total_kv_heads=3,
                first_kv_head=0,
                connector=connector,
                context=context,
                wake=lambda: wakes.put(None),
                report=self.reports.put,
                clock=clock,
            )
        )

    def entry(self) -> Entry:
        return Entry(
            name=f"{self.role}-0/rank-0",
            kind="rank",
            incarnation=1,
            engine=f"{self.role}-0",
            role=self.role,
            engine_id=ENGINE_IDS[self.role],
            address=Address(side_channel=self.transfer.endpoint),
        )

    def events(self) -> list[Any]:
        """What a wake brings."""
        while True:
            self._wakes.get(timeout=60)
            if events := self.transfer.take_events():
                return events


@pytest.fixture
def context() -> Iterator[SecureContext]:
    context = SecureContext(new_launch_keys())
    yield context
    context.close()


@pytest.fixture
def start(context: SecureContext) -> Iterator[Callable[..., Rank]]:
    fabric = Fabric()
    started: list[Rank] = []

    def start(role: str) -> Rank:
        started.append(Rank(context, role, FakeConnector(f"{role}-0/rank-0#1", fabric)))
        return started[-1]

    yield start
    for rank in started:
        rank.transfer.close(timeout_s=60)


def remote(lease_id: str) -> RemoteKV:
    return RemoteKV(
        engine_id=ENGINE_IDS["prefill"],
        lease_id=lease_id,
        host="192.0.2.1",
        port=1,
        block_ids=[],
        num_tokens=1,
    )


def test_two_threads_shake_hands_and_pull(start):
    holder, puller = start("prefill"), start("decode")
    puller.transfer.update_registry([holder.entry(), puller.entry()])
    assert isinstance(puller.reports.get(timeout=60), PairReady)
    holder.transfer.submit([grant("r", [4, 5])])
    puller.transfer.submit([pull("p", remote("r"), [1, 2])])
    (finished,) = puller.events()
    assert finished.ok
    assert torch.equal(puller.kv_cache[[1, 2]], holder.kv_cache[[4, 5]])
    assert holder.events() == [LeaseEnded(lease_id="r", reason="pulled")]
    assert finished.num_bytes == 2 * layout_of().block_bytes


def test_a_reader_that_comes_before_its_lease_waits_for_it(start, context):
    holder = start("prefill")
    socket = context.connect(zmq.DEALER, holder.transfer.endpoint)
    socket.rcvtimeo = 60_000
    for kind, lease_id in ((PullBegin, "r"), (PullBegin, "other")):
        engine_id = ENGINE_IDS["prefill"] if lease_id == "r" else "c" * 32
        socket.send(
            to_prefill_side.encode(
                kind(
                    call_id=1,
                    engine_id=engine_id,
                    lease_id=lease_id,
                    reader="x",
                    num_decode_ranks=1,
                )
            )
        )
    assert isinstance(to_decode_side.decode(socket.recv()), Refused), (
        "both questions are there, the second is answered"
    )
    holder.transfer.submit([grant("r", [4, 5])])
    answer = to_decode_side.decode(socket.recv())
    assert isinstance(answer, PullReply)
    assert answer.groups[0].block_ids == [4, 5]
    socket.close()


def test_a_lease_expires_without_anybody_asking(start):
    holder = start("prefill")
    holder.transfer.submit([grant("r", [4], lease_s=0.01)])
    assert holder.events() == [LeaseEnded(lease_id="r", reason="expired")]


def test_hostile_frames_are_refused_and_the_thread_goes_on(start, context):
    holder = start("prefill")
    socket = context.connect(zmq.DEALER, holder.transfer.endpoint)
    socket.rcvtimeo = 60_000
    question = PullBegin(
        call_id=1, engine_id="c" * 32, lease_id="r", reader="x", num_decode_ranks=1
    )
    good = to_prefill_side.encode(question)
    for frames in (
        [b""],
        [b"\xc1"],
        [os.urandom(500)],
        [good[:-3]],
        [good, good],
        [b"", good],
        [b"\x91" * 100_000],
    ):
        socket.send_multipart(frames)
    socket.send(good)
    answer = to_decode_side.decode(socket.recv())
    assert isinstance(answer, Refused)
    assert "belongs to engine_id aaaa" in answer.reason
    socket.close()


@given(st.binary(max_size=200))
def test_no_bytes_can_break_the_codec(frame):
    with contextlib.suppress(ProtocolError):
        to_prefill_side.decode(frame)


def test_a_stranger_gets_no_answer(start):
    holder = start("prefill")
    stranger = SecureContext(new_launch_keys())
    socket = stranger.connect(zmq.DEALER, holder.transfer.endpoint)
    monitor = socket.get_monitor_socket(
        zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_CLOSED
    )
    socket.send(b"x")
    assert monitor.poll(60_000)
    assert not socket.poll(0)
    socket.disable_monitor()
    socket.close(linger=0)
    stranger.close()


class BrokenConnector(FakeConnector):
    def open(self, memory: LocalMemory) -> None:
        raise TransferError("no such backend")


def test_a_connector_that_cannot_start_is_told(context):
    rank = Rank(context, "prefill", BrokenConnector("x", Fabric()))
    with pytest.raises(TransferError, match="the connector cannot start: no such backend"):
        rank.transfer.wait_started(60)
    with pytest.raises(TransferError, match="the transfer thread has died: no such backend"):
        rank.events()
    rank.transfer.close(timeout_s=60)
    rank.transfer.submit([grant("r", [1])])
