"""Falling asleep and waking up, rank by rank, with memory and transfers that do what the test
says.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from pdlaunch.engine.sleep import RankSleeper, SleepCoordinator
from pdlaunch.engine.step import SleepRank, WakeRank
from pdlaunch.errors import MemoryPoolError, TransferError
from pdlaunch.protocol.control import SleepState
from pdlaunch.protocol.engine import EngineStats, Hello, RequestFinished, Sleep, SleepReply, WakeUp
from tests.engine.test_leader import Recorder, add, make_leader

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


class Engine:
    """A coordinator, its own rank and others whose reports come when the test delivers them."""

    def __init__(self, num_ranks: int) -> None:
        self.now = 0.0
        self.ranks = [FakeRank() for _ in range(num_ranks)]
        self.last = self.ranks[-1]
        self.sleepers = [
            RankSleeper(rank, rank, rank.announce, peers_timeout_s=5.0, clock=lambda: self.now)  # type: ignore[arg-type]
            for rank in self.ranks
        ]
        self.scheduler = Mock(has_work=lambda: False)
        self.holds()
        self.replies: list[SleepReply] = []
        self.mail: list[SleepRank | WakeRank] = []
        self.coordinator = SleepCoordinator(
            self.sleepers[0],
            num_ranks=num_ranks,
            notify_ranks=self.mail.append,
            scheduler=self.scheduler,
            answer=self.replies.append,
            clock=lambda: self.now,
        )

    def holds(self, **counts: int) -> None:
        self.scheduler.requests.stats.return_value = EngineStats(**counts)  # type: ignore[arg-type]

    def sleep(self, level: int = 1, timeout_s: float = 10.0) -> None:
        self.coordinator.begin(Sleep(call_id=1, level=level, timeout_s=timeout_s))
        self.turn()

    def wake_up(self, *tags: str) -> None:
        self.coordinator.begin(WakeUp(call_id=2, tags=list(tags)))
        self.turn()

    def turn(self) -> None:
        for _ in range(4):
            for sleeper in self.sleepers[1:]:
                for message in self.mail:
                    sleeper.begin(message)
                if (report := sleeper.advance()) is not None:
                    self.coordinator.on_report(report)
            self.mail.clear()
            self.coordinator.advance()

    def reply(self) -> SleepReply:
        (reply,) = self.replies
        self.replies.clear()
        return reply

    def fall_asleep(self, level: int = 1) -> SleepReply:
        self.sleep(level)
        return self.reply()

    @property
    def is_awake(self) -> bool:
        registered = {rank.registered and not rank.sleeping_tags for rank in self.ranks}
        assert registered == {self.coordinator.computes}
        return self.coordinator.computes


@pytest.fixture(params=[1, 3])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(request.param)


def test_peers_go_before_the_memory_and_come_back_after_it(engine: Engine) -> None:
    reply = engine.fall_asleep(level=2)
    assert (reply.error, reply.num_bytes) == (None, 100 * len(engine.ranks))
    assert set(reply.sleeping_tags) == ALL
    assert not engine.is_awake
    engine.wake_up()
    reply = engine.reply()
    assert (reply.error, reply.num_bytes) == (None, 100 * len(engine.ranks))
    assert reply.sleeping_tags == []
    assert engine.is_awake
    asleep, awake = ["suspend", "sleeping", "sleep 2"], ["wake kv_cache,weights", "resume", "awake"]
    assert [rank.log for rank in engine.ranks] == [asleep + awake] * len(engine.ranks)
    engine.scheduler.requests.reset_prefix_cache.assert_called_once()


@pytest.mark.parametrize(
    "name",
    [
        "num_running",
        "num_waiting",
        "num_waiting_for_kv",
        "num_leased_requests",
        "num_offload_jobs",
        "num_quarantined_blocks",
    ],
)
def test_sleep_waits_for_everything_that_holds_blocks(name: str, engine: Engine) -> None:
    engine.holds(**{name: 1})
    engine.sleep(timeout_s=10.0)
    assert not engine.replies
    assert engine.is_awake
    assert engine.coordinator.wait_s() < 1
    engine.holds()
    engine.turn()
    assert engine.reply().error is None
    assert not engine.is_awake


def test_refused_when_time_is_up_and_nothing_has_changed(engine: Engine) -> None:
    engine.holds(num_running=2, num_leased_requests=1)
    engine.sleep(timeout_s=0.0)
    error = "the engine cannot sleep now: 2 requests running, 1 requests under lease"
    assert engine.reply().error == error
    assert engine.is_awake
    assert not any(rank.log for rank in engine.ranks)


@pytest.mark.parametrize("cause", ["memory_error", "transfer_error"])
def test_a_rank_that_cannot_sleep_wakes_the_others(cause: str, engine: Engine) -> None:
    wake_up = engine.last.wake_up

    def mended(tags: Collection[str]) -> int:
        engine.last.memory_error = ""
        return wake_up(tags)

    engine.last.wake_up = mended  # type: ignore[method-assign]
    setattr(engine.last, cause, "no room in host memory")
    reply = engine.fall_asleep()
    assert "no room in host memory" in (reply.error or "")
    assert reply.sleeping_tags == []
    assert engine.is_awake


def test_ready_only_when_peers_have_shaken_hands_or_had_their_time(engine: Engine) -> None:
    for comes_back in (True, False):
        engine.fall_asleep()
        engine.last.connected = False
        engine.wake_up()
        assert not engine.replies
        assert not engine.coordinator.computes
        engine.last.connected = comes_back
        engine.now += 0.0 if comes_back else 5.0
        engine.turn()
        assert engine.reply().error is None
        assert engine.is_awake


def test_a_restarted_server_forgets_a_call_that_has_not_begun(engine: Engine) -> None:
    engine.holds(num_running=1)
    engine.sleep()
    engine.sleep()
    assert engine.reply().error == "the engine still handles another sleep or wake-up"
    engine.coordinator.forget_caller()
    engine.holds()
    engine.turn()
    assert engine.is_awake
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
    engine, is_busy = Engine(num_ranks), False
    for action in actions:
        match action.split():
            case ["sleep"]:
                engine.sleep(timeout_s=0.0)
            case ["wake", *tags]:
                engine.wake_up(*tags)
            case ["busy"]:
                is_busy = not is_busy
                engine.holds(num_running=int(is_busy))
                continue
            case _:
                engine.last.memory_error = "short" if action == "fail" else ""
                continue
        awake = [not rank.sleeping_tags for rank in engine.ranks]
        assert [rank.registered for rank in engine.ranks] == awake
        assert engine.coordinator.computes == all(awake)
        assert bool(engine.reply().sleeping_tags) == (not all(awake))


def test_the_step_loop_drains_sleeps_refuses_and_serves_again() -> None:
    class SleepingRecorder(Recorder):
        def __init__(self, *requests: Any) -> None:
            super().__init__(*requests)
            self.rank = FakeRank()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.rank, name)

    prompt = add("a", 3)
    recorder = SleepingRecorder(prompt, Sleep(call_id=7, level=1, timeout_s=100.0))
    leader = make_leader(recorder, enable_sleep_mode=True)
    while not any(isinstance(message, SleepReply) for message in recorder.told):
        leader.turn()
    kinds = [type(message).__name__ for message in recorder.told]
    assert kinds == ["Tokens", "Tokens", "RequestFinished", "SleepReply"]
    recorder.told.clear()
    recorder.requests = [structs.replace(prompt, request_id="b"), Hello(), WakeUp(call_id=8)]
    leader.turn()
    recorder.requests = [structs.replace(prompt, request_id="c")]
    while "c" not in [
        message.request_id for message in recorder.told if isinstance(message, RequestFinished)
    ]:
        leader.turn()
    refused, welcome, woken, *_, finished = recorder.told
    assert (refused.request_id, refused.error) == ("b", "the engine is asleep")
    assert set(welcome.sleeping_tags) == ALL
    assert (woken.call_id, woken.error, woken.sleeping_tags) == (8, None, [])
    assert (finished.reason, finished.num_cached_tokens) == ("length", 0)
