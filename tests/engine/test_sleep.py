"""Falling asleep and waking up, rank by rank, with memory and transfers that do what the test
says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from pdlaunch.engine.sleep import RankSleeper, SleepCoordinator, SleepPhase
from pdlaunch.engine.step import SleepRank, SleepReport, WakeRank
from pdlaunch.errors import MemoryPoolError, TransferError
from pdlaunch.protocol.control import SleepState
from pdlaunch.protocol.engine import (
    AddRequest,
    EngineStats,
    FromRank,
    Hello,
    RequestFinished,
    SamplingParams,
    Sleep,
    SleepReply,
    ToRank,
    WakeUp,
    Welcome,
)
from tests.engine.test_leader import Recorder, make_leader

ALL = frozenset({"weights", "kv_cache"})


@dataclass
class FakeRank:
    """Memory and transfers of one rank, and what they were told; checks that peers never see memory
    that sleeps.
    """

    log: list[str] = field(default_factory=list)
    sleeping_tags: frozenset[str] = frozenset()
    registered: bool = True
    connected: bool = True
    memory_error: str = ""
    transfer_error: str = ""
    unmapped: bool = False

    def sleep(self, level: int) -> int:
        assert not self.registered, "the memory goes under the eyes of peers"
        assert self.unmapped, "peers still hold the memory"
        if self.memory_error:
            raise MemoryPoolError(self.memory_error)
        self.sleeping_tags = ALL
        self.log.append(f"sleep {level}")
        return 100

    def wake_up(self, tags: Collection[str]) -> int:
        if self.memory_error:
            raise MemoryPoolError(self.memory_error)
        woken = self.sleeping_tags & set(tags)
        self.sleeping_tags -= woken
        self.log.append(f"wake {','.join(sorted(woken))}")
        return 50 * len(woken)

    def suspend(self, timeout_s: float) -> None:
        if self.transfer_error:
            raise TransferError(self.transfer_error)
        self.registered = False
        self.log.append("suspend")

    def wait_unmapped(self, timeout_s: float) -> bool:
        assert not self.registered, "peers may still come"
        self.unmapped = True
        return True

    def resume(self, timeout_s: float) -> None:
        assert not self.sleeping_tags, "registers memory that sleeps"
        self.registered, self.unmapped = True, False
        self.log.append("resume")

    def announce(self, state: SleepState) -> None:
        self.log.append(state.state)


@dataclass
class FakeScheduler:
    counts: EngineStats = field(default_factory=EngineStats)
    queued: bool = False
    num_resets: int = 0

    @property
    def requests(self) -> FakeScheduler:
        """Their life is faked here, too."""
        return self

    def stats(self) -> EngineStats:
        return self.counts

    def has_work(self) -> bool:
        return self.queued

    def reset_prefix_cache(self) -> None:
        self.num_resets += 1


class Engine:
    """A coordinator, its own rank and others whose reports come when the test delivers them."""

    def __init__(self, num_ranks: int = 1, *, enabled: bool = True) -> None:
        self.now = 0.0
        self.ranks = [FakeRank() for _ in range(num_ranks)]
        self.sleepers = [
            RankSleeper(rank, rank, rank.announce, peers_timeout_s=5.0, clock=lambda: self.now)
            for rank in self.ranks
        ]
        self.scheduler = FakeScheduler()
        self.replies: list[SleepReply] = []
        self.mail: list[SleepRank | WakeRank] = []
        scheduler: Any = self.scheduler
        self.coordinator = SleepCoordinator(
            self.sleepers[0],
            enabled=enabled,
            num_ranks=num_ranks,
            tell_ranks=self.mail.append,
            scheduler=scheduler,
            answer=self.replies.append,
            clock=lambda: self.now,
        )

    def sleep(self, level: int = 1, timeout_s: float = 10.0) -> None:
        self.coordinator.sleep(Sleep(call_id=1, level=level, timeout_s=timeout_s))
        self.turn()

    def wake_up(self, *tags: str) -> None:
        self.coordinator.wake_up(WakeUp(call_id=2, tags=list(tags)))
        self.turn()

    def turn(self) -> None:
        """One turn of every rank's loop."""
        self.coordinator.advance()
        while self.mail:
            for message in [self.mail.pop(0)]:
                for sleeper in self.sleepers[1:]:
                    match message:
                        case SleepRank(level=level):
                            self._report(sleeper.sleep(level))
                        case WakeRank(tags=tags):
                            self._report(sleeper.wake_up(tags))
        for sleeper in self.sleepers[1:]:
            self._report(sleeper.advance())

    def reply(self) -> SleepReply:
        (reply,) = self.replies
        self.replies.clear()
        return reply

    def _report(self, report: SleepReport | None) -> None:
        if report is not None:
            self.coordinator.on_report(report)


@pytest.fixture(params=[1, 3])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    return Engine(request.param)


def test_peers_go_before_the_memory_and_come_back_after_it(engine: Engine) -> None:
    engine.sleep(level=2)
    reply = engine.reply()
    assert (reply.error, reply.num_bytes) == (None, 100 * len(engine.ranks))
    assert set(reply.sleeping_tags) == ALL
    assert not engine.coordinator.computes
    engine.wake_up()
    reply = engine.reply()
    assert (reply.error, reply.num_bytes, reply.sleeping_tags) == (
        None,
        100 * len(engine.ranks),
        [],
    )
    assert engine.coordinator.phase is SleepPhase.AWAKE
    for rank in engine.ranks:
        assert rank.log == [
            "suspend",
            "sleeping",
            "sleep 2",
            "wake kv_cache,weights",
            "resume",
            "awake",
        ]
    assert engine.scheduler.num_resets == 1


def test_tags_wake_one_by_one_and_peers_only_with_the_last(engine: Engine) -> None:
    engine.sleep()
    engine.replies.clear()
    engine.wake_up("weights")
    assert engine.reply().sleeping_tags == ["kv_cache"]
    assert engine.coordinator.phase is SleepPhase.ASLEEP
    assert not any(rank.registered for rank in engine.ranks)
    engine.wake_up("kv_cache")
    assert engine.reply().sleeping_tags == []
    assert all(rank.registered for rank in engine.ranks)


@pytest.mark.parametrize(
    "counts",
    [
        {"num_running": 1},
        {"num_waiting": 1},
        {"num_waiting_for_kv": 1},
        {"num_leased_requests": 1},
        {"num_quarantined_blocks": 1},
    ],
)
def test_sleep_waits_for_everything_that_holds_blocks(
    counts: dict[str, int], engine: Engine
) -> None:
    engine.scheduler.counts = EngineStats(**counts)
    engine.sleep(timeout_s=10.0)
    assert not engine.replies
    assert engine.coordinator.computes
    assert engine.coordinator.wait_s() < 1
    engine.scheduler.counts = EngineStats()
    engine.turn()
    assert engine.reply().error is None
    assert engine.coordinator.phase is SleepPhase.ASLEEP


def test_refused_when_time_is_up_and_nothing_has_changed(engine: Engine) -> None:
    engine.scheduler.counts = EngineStats(num_running=2, num_leased_requests=1)
    engine.sleep(timeout_s=0.0)
    assert (
        engine.reply().error == "the engine cannot sleep now: 2 requests running, 1 requests leased"
    )
    assert engine.coordinator.phase is SleepPhase.AWAKE
    assert not any(rank.log for rank in engine.ranks)


@pytest.mark.parametrize("field_name", ["memory_error", "transfer_error"])
def test_a_rank_that_cannot_sleep_wakes_the_others(field_name: str, engine: Engine) -> None:
    setattr(engine.ranks[-1], field_name, "no room in host memory")
    engine.sleep()
    if field_name == "memory_error":
        # The rank says so again when it is to wake up: it never slept.
        engine.ranks[-1].memory_error = ""
    for _ in range(3):
        engine.turn()
    reply = engine.reply()
    assert reply.error is not None
    assert "no room in host memory" in reply.error
    assert reply.sleeping_tags == []
    assert engine.coordinator.phase is SleepPhase.AWAKE
    assert all(rank.registered and not rank.sleeping_tags for rank in engine.ranks)


def test_too_little_memory_leaves_the_engine_asleep_until_it_is_asked_again(engine: Engine) -> None:
    engine.sleep()
    engine.replies.clear()
    engine.ranks[-1].memory_error = "100 bytes cannot wake up"
    engine.wake_up()
    reply = engine.reply()
    assert reply.error == "100 bytes cannot wake up"
    assert reply.sleeping_tags
    assert engine.coordinator.phase is SleepPhase.ASLEEP
    engine.ranks[-1].memory_error = ""
    engine.wake_up()
    assert engine.reply().sleeping_tags == []
    assert all(rank.registered for rank in engine.ranks)


def test_ready_only_when_peers_have_shaken_hands_or_had_their_time(engine: Engine) -> None:
    engine.sleep()
    engine.replies.clear()
    engine.ranks[-1].connected = False
    engine.wake_up()
    assert not engine.replies
    assert not engine.coordinator.computes
    engine.ranks[-1].connected = True
    engine.turn()
    assert engine.reply().error is None
    engine.sleep()
    engine.replies.clear()
    engine.ranks[-1].connected = False
    engine.wake_up()
    engine.now += 5.0
    engine.turn()
    assert engine.reply().error is None
    assert engine.coordinator.computes


def test_calls_that_make_no_sense_are_answered(engine: Engine) -> None:
    engine.wake_up()
    assert engine.reply().error is None
    engine.sleep(level=3)
    assert engine.reply().error == "level is 3; it is 1 or 2"
    engine.sleep()
    engine.replies.clear()
    engine.sleep()
    assert set(engine.reply().sleeping_tags) == ALL
    engine.wake_up("activations")
    assert engine.reply().error == "unknown tags activations; there are weights, kv_cache"
    off = Engine(enabled=False)
    off.sleep()
    assert off.reply().error == "enable_sleep_mode is off"


def test_a_restarted_server_forgets_a_call_that_has_not_begun(engine: Engine) -> None:
    engine.scheduler.counts = EngineStats(num_running=1)
    engine.sleep()
    engine.coordinator.forget_caller()
    engine.scheduler.counts = EngineStats()
    engine.turn()
    assert engine.coordinator.phase is SleepPhase.AWAKE
    assert not engine.replies


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(
        st.sampled_from(["sleep", "wake", "wake weights", "wake kv_cache", "fail", "mend", "busy"]),
        max_size=14,
    ),
)
def test_each_call_gets_one_reply_and_no_rank_is_left_behind(
    num_ranks: int, actions: list[str]
) -> None:
    engine = Engine(num_ranks)
    for action in actions:
        before = len(engine.replies)
        match action.split():
            case ["sleep"]:
                engine.sleep(timeout_s=0.0)
            case ["wake", *tags]:
                engine.wake_up(*tags)
            case ["fail"]:
                engine.ranks[-1].memory_error = "short"
                continue
            case ["mend"]:
                engine.ranks[-1].memory_error = ""
                continue
            case _:
                engine.scheduler.counts = EngineStats(
                    num_running=1 - engine.scheduler.counts.num_running
                )
                continue
        assert len(engine.replies) == before + 1
        awake = [not rank.sleeping_tags for rank in engine.ranks]
        assert [rank.registered for rank in engine.ranks] == awake
        assert engine.coordinator.computes == all(awake)
        assert bool(engine.replies[-1].sleeping_tags) == (not all(awake))


class SleepingRecorder(Recorder):
    """Also memory and transfers of the one rank."""

    def __init__(self, requests: list[ToRank]) -> None:
        super().__init__(requests)
        self.rank = FakeRank()

    def send(self, message: FromRank) -> None:
        super().send(message)
        if isinstance(message, SleepReply | Welcome):
            self.told.append(message)

    @property
    def sleeping_tags(self) -> frozenset[str]:
        return self.rank.sleeping_tags

    @property
    def connected(self) -> bool:
        return self.rank.connected

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rank, name)


def test_the_step_loop_drains_sleeps_refuses_and_serves_again() -> None:
    prompt = AddRequest(
        request_id="a", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=3)
    )
    recorder = SleepingRecorder([prompt, Sleep(call_id=7, level=1, timeout_s=100.0)])
    leader = make_leader(recorder, enable_sleep_mode=True)
    while not any(isinstance(message, SleepReply) for message in recorder.told):
        leader.turn()
    kinds = [type(message).__name__ for message in recorder.told]
    assert kinds == ["Tokens", "Tokens", "RequestFinished", "SleepReply"]
    recorder.told.clear()
    again = structs.replace(prompt, request_id="b")
    recorder.requests = [
        again,
        Hello(),
        WakeUp(call_id=8),
        structs.replace(prompt, request_id="c"),
    ]
    while not any(
        isinstance(message, RequestFinished) and message.request_id == "c"
        for message in recorder.told
    ):
        leader.turn()
    refused, welcome, woken, *_, finished = recorder.told
    assert isinstance(refused, RequestFinished)
    assert (refused.request_id, refused.reason, refused.error) == (
        "b",
        "error",
        "the engine sleeps",
    )
    assert isinstance(welcome, Welcome)
    assert set(welcome.sleeping_tags) == ALL
    assert isinstance(woken, SleepReply)
    assert (woken.call_id, woken.error, woken.sleeping_tags) == (8, None, [])
    assert isinstance(finished, RequestFinished)
    assert finished.reason == "length"
    assert finished.num_cached_tokens == 0
