"""Connectors whose holder writes: who may ask for what, and what proves that a write is over."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pdlaunch.protocol.side_channel import PullBegin, Push, PushEnded, Refused, ToPrefillSide
from pdlaunch.protocol.transfer import PullDrained
from pdlaunch.transfer.connectors.connector import PushedRead, PushJob
from pdlaunch.transfer.connectors.scratch import NUM_WARM_READS
from pdlaunch.transfer.leases import PrefillSide
from tests.transfer import pull_world
from tests.transfer.fakes import FakeChannel, FakeConnector, FakeRead
from tests.transfer.pull_world import HolderRank, World
from tests.transfer.rank_process import cancel, grant, pull


class WrittenRead(FakeRead, PushedRead):
    """Lands when the holder's answer says so."""

    target = b"target"

    def end(self, error: str) -> None:
        if error:
            self.fail()
        else:
            self.land()


class WritingConnector(FakeConnector):
    pushes = True
    read_class = WrittenRead


class PushChannel(FakeChannel):
    def __init__(self, holder: PrefillSide, asked: list[tuple[FakeChannel, Push]]) -> None:
        super().__init__(holder.answer)
        self._asked = asked

    def send(self, message: ToPrefillSide) -> None:
        if not isinstance(message, Push):
            super().send(message)
            return
        self.sent.append(message)
        if message.block_ids:
            self._asked.append((self, message))
        else:
            self.inbox.append(PushEnded(call_id=message.call_id, ok=True))


class PushWorld(World):
    """Holders that answer a Push when the test says so; their scratch at once."""

    def __post_init__(self) -> None:
        self.fabric.stalled = True
        self.asked: list[tuple[FakeChannel, Push]] = []
        super().__post_init__()

    def open_channel(self, endpoint: str) -> FakeChannel:
        holder = self.holders[endpoint]
        holder.channels.append(PushChannel(holder.holder, self.asked))
        return holder.channel

    def turn(self, times: int = 2 * (1 + NUM_WARM_READS)) -> None:
        """Enough for a handshake: a READ of a scratch is asked for in one turn and seen to have
        ended in the next.
        """
        super().turn(times)

    def end_push(self, *, ok: bool) -> None:
        channel, message = self.asked.pop(0)
        channel.inbox.append(
            PushEnded(call_id=message.call_id, ok=ok, error="" if ok else "broken")
        )
        self.turn()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[PushWorld]:
    monkeypatch.setattr(pull_world, "FakeConnector", WritingConnector)
    world = PushWorld()
    yield world
    world.close()


def start_pull(world: PushWorld, num_attempts: int = 1) -> HolderRank:
    holder = world.connect()
    holder.holder.grant(grant("r", [4, 5]))
    world.pulls.start(pull("p", holder.remote("r"), [1, 2], num_attempts=num_attempts))
    world.turn()
    return holder


def test_a_pull_ends_with_the_answer_of_the_holder(world: PushWorld) -> None:
    holder = start_pull(world)
    _, message = world.asked[0]
    assert (message.lease_id, message.block_ids, message.target) == ("r", [4, 5], b"target")
    assert not world.events
    world.end_push(ok=True)
    assert world.finished().ok
    assert torch.equal(world.kv_cache[[1, 2]], holder.kv_cache[[4, 5]])


def test_a_write_that_failed_is_asked_for_again(world: PushWorld) -> None:
    holder = start_pull(world, num_attempts=2)
    world.end_push(ok=False)
    assert not world.events
    world.clock.now += 1.0
    world.turn()
    world.end_push(ok=True)
    finished = world.finished()
    assert (finished.ok, finished.num_retries) == (True, 1)
    assert torch.equal(world.kv_cache[[1, 2]], holder.kv_cache[[4, 5]])


def test_a_cancelled_pull_owns_its_blocks_until_the_answer(world: PushWorld) -> None:
    start_pull(world)
    world.pulls.cancel(cancel("p"))
    assert world.finished().in_flight
    world.turn()
    assert not world.events
    world.end_push(ok=True)
    assert world.events == [PullDrained(pull_id="p")]


def test_answers_arrive_although_the_connection_was_given_up(world: PushWorld) -> None:
    holder = start_pull(world)
    channel = holder.channel
    world.peers.peers[holder.identity.name].reconnect()
    world.pulls.cancel(cancel("p"))
    world.turn()
    assert world.finished().in_flight
    assert not channel.closed
    world.clock.now += 60
    world.turn()
    assert len(holder.channels) == 1, "no new connection while a write is under way"
    world.end_push(ok=False)
    assert world.events == [PullDrained(pull_id="p")]
    assert channel.closed
    world.clock.now += 60
    world.turn()
    assert len(holder.channels) == 2


def test_the_registry_alone_does_not_prove_that_a_write_is_over(world: PushWorld) -> None:
    holder = start_pull(world)
    world.peers.update([])
    world.turn()
    assert world.finished().in_flight
    world.turn()
    assert not world.events
    holder.channel.broken = True
    world.turn()
    assert world.events == [PullDrained(pull_id="p")]


def test_a_broken_connection_is_not_asked_to_write(world: PushWorld) -> None:
    holder = world.connect()
    holder.holder.grant(grant("r", [4, 5]))
    holder.channel.broken = True
    world.pulls.start(pull("p", holder.remote("r"), [1, 2]))
    world.turn()
    finished = world.finished()
    assert "broke" in finished.error
    assert not finished.in_flight
    assert not world.asked


def question(holder: HolderRank, **changes: Any) -> Push:
    fields = {
        "call_id": 1,
        "engine_id": holder.identity.engine_id,
        "lease_id": "r",
        "reader": "reader",
        "block_ids": [5, 4],
        "first_head": 1,
        "num_heads": 2,
        "target": b"",
    }
    return Push(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"engine_id": "f" * 32}, "belongs to engine_id"),
        ({"lease_id": "other"}, "request other has no lease here"),
        ({"reader": "other"}, "reader other has no open pull"),
        ({"block_ids": [4, 6]}, "no lease for all of these blocks"),
        ({"block_ids": [-1]}, "no lease for all of these blocks"),
        ({"first_head": 2}, "there are no 2 heads from 2 on"),
        ({"first_head": -1}, "there are no 2 heads from -1 on"),
        ({"num_heads": 0}, "there are no 0 heads from 1 on"),
    ],
)
def test_a_reader_gets_only_what_it_has_leased(
    world: PushWorld, changes: dict[str, Any], reason: str
) -> None:
    holder = world.add()
    holder.holder.grant(grant("r", [4, 5]))
    begin = PullBegin(
        call_id=1,
        engine_id=holder.identity.engine_id,
        lease_id="r",
        reader="reader",
        num_decode_ranks=1,
    )
    jobs: list[PushJob] = []

    def push(job: PushJob) -> Future[None]:
        jobs.append(job)
        return Future()

    holder.holder._pusher = cast(Any, SimpleNamespace(push=push))
    holder.holder.ask(begin, question(holder))
    assert [(list(job.blocks), job.heads) for job in jobs] == [([5, 4], range(1, 3))]
    (refused,) = holder.holder.ask(question(holder, **changes))
    assert isinstance(refused, Refused)
    assert reason in refused.reason
    assert len(jobs) == 1


def test_a_holder_that_does_not_write_refuses(world: PushWorld) -> None:
    holder = world.add()
    answer = holder.holder.answer(question(holder))
    assert isinstance(answer, Refused)
    assert "does not write" in answer.reason
