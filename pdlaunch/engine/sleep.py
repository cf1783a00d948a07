"""Puts an engine to sleep and wakes it: rank 0 decides when; every rank lets go of its peers and
memory.

::

    AWAKE ── Sleep ──▶ DRAINING ── nothing holds a block ──▶ FALLING_ASLEEP ── all ranks ──▶ ASLEEP
      ▲                   └── time is up: refused, AWAKE            └── a rank cannot ──▶ WAKING
      └────────── all ranks, all tags, peers have shaken hands ── WAKING ◀── WakeUp ─────────┘
                                                                     └── tags are missing ──▶ ASLEEP
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Callable, Collection

from pdlaunch.engine.memory.pools import TAGS
from pdlaunch.engine.runner import ModelRunner
from pdlaunch.engine.scheduler import Scheduler
from pdlaunch.engine.step import SleepRank, SleepReport, WakeRank
from pdlaunch.errors import ConfigError, MemoryPoolError, TransferError
from pdlaunch.protocol.control import SleepState
from pdlaunch.protocol.engine import EngineStats, Sleep, SleepReply, WakeUp
from pdlaunch.transfer.thread import TransferThread

logger = logging.getLogger(__name__)

TRANSFER_TIMEOUT_S = 20.0
"""Longest time that the transfer thread may take to let go of its memory, or to take it again."""
UNMAP_TIMEOUT_S = 5.0
"""Longest time that peers get to unmap this rank's memory, which the device gets back then."""
POLL_S = 0.05  # time between two looks at whether the engine is idle, or peers are back


class RankSleeper:
    """Puts one rank to sleep and wakes it up; this may take seconds, as nothing runs."""

    def __init__(
        self,
        memory: ModelRunner,
        transfer: TransferThread,
        announce: Callable[[SleepState], None],
        *,
        peers_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        """``announce`` tells the supervisor, and so the peers, which have time to come back."""
        self._memory = memory
        self._transfer = transfer
        self._announce = announce
        self._peers_timeout_s = peers_timeout_s
        self._clock = clock
        self._woken: SleepReport | None = None
        self._deadline_at: float | None = None

    @property
    def sleeping_tags(self) -> list[str]:
        return sorted(self._memory.sleeping_tags)

    @property
    def waits_for_peers(self) -> bool:
        return self._woken is not None

    def sleep(self, level: int) -> SleepReport:
        """Let peers go, then give the memory back. An error leaves the rank awake."""
        if self._memory.sleeping_tags:
            return self._report()
        try:
            self._transfer.suspend(TRANSFER_TIMEOUT_S)
        except TransferError as error:
            return self._report(error=error)
        # Peers see this in the registry and unmap the memory. Only now: a rank whose transfers do
        # not end stays awake.
        self._announce(SleepState(state="sleeping"))
        if not self._transfer.wait_unmapped(UNMAP_TIMEOUT_S):
            logger.warning(
                "a peer has not unmapped the KV cache within %g s: its memory is free when it has",
                UNMAP_TIMEOUT_S,
            )
        try:
            return self._report(self._memory.sleep(level))
        except MemoryPoolError as error:
            self._reconnect()
            return self._report(error=error)

    def wake_up(self, tags: Collection[str]) -> SleepReport | None:
        """Take memory back and let peers come; ``advance`` reports after a None."""
        was_asleep = bool(self._memory.sleeping_tags)
        try:
            num_bytes = self._memory.wake_up(tags)
        except (MemoryPoolError, ConfigError) as error:
            return self._report(error=error)
        if self._memory.sleeping_tags or not was_asleep:
            return self._report(num_bytes)
        self._reconnect()
        self._woken = self._report(num_bytes)
        self._deadline_at = self._clock() + self._peers_timeout_s
        return self.advance()

    def advance(self) -> SleepReport | None:
        """Report a ``wake_up`` once all peers have shaken hands or their time is up."""
        if self._woken is None:
            return None
        if not self._transfer.connected:
            if self._deadline_at is not None and self._clock() < self._deadline_at:
                return None
            logger.warning(
                "not every peer has shaken hands within %g s after waking up", self._peers_timeout_s
            )
        report, self._woken = self._woken, None
        return report

    def _reconnect(self) -> None:
        """Let peers come again. Raises TransferError; then the rank has to be replaced."""
        self._transfer.resume(TRANSFER_TIMEOUT_S)
        self._announce(SleepState(state="awake"))

    def _report(self, num_bytes: int = 0, error: Exception | None = None) -> SleepReport:
        return SleepReport(
            num_bytes=num_bytes,
            sleeping_tags=self.sleeping_tags,
            error=None if error is None else str(error),
        )


class SleepPhase(enum.Enum):
    AWAKE = enum.auto()
    DRAINING = enum.auto()
    FALLING_ASLEEP = enum.auto()
    ASLEEP = enum.auto()
    WAKING = enum.auto()


class SleepCoordinator:
    """Does rank 0's part: one Sleep or WakeUp at a time, each answered with one SleepReply."""

    def __init__(
        self,
        sleeper: RankSleeper,
        *,
        enabled: bool,
        num_ranks: int,
        tell_ranks: Callable[[SleepRank | WakeRank], None],
        scheduler: Scheduler,
        answer: Callable[[SleepReply], None],
        clock: Callable[[], float],
    ) -> None:
        self._sleeper = sleeper
        self._enabled = enabled
        self._num_ranks = num_ranks
        self._tell_ranks = tell_ranks
        self._scheduler = scheduler
        self._answer = answer
        self._clock = clock
        self._call: Sleep | WakeUp | None = None
        self._deadline_at: float | None = None
        self._reports: list[SleepReport] = []
        self._failure: str | None = None
        """Error of a rank that could not fall asleep; told once all are awake again."""
        self.phase = SleepPhase.AWAKE

    @property
    def computes(self) -> bool:
        """Return whether requests may be scheduled: all memory is there."""
        return self.phase in (SleepPhase.AWAKE, SleepPhase.DRAINING)

    @property
    def sleeping_tags(self) -> list[str]:
        """Return the tags whose memory sleeps; not empty while the engine serves nothing."""
        return [] if self.computes else self._sleeper.sleeping_tags or list(TAGS)

    def wait_s(self) -> float:
        """Return for how long nothing is due here."""
        polls = self.phase is SleepPhase.DRAINING or self._sleeper.waits_for_peers
        return POLL_S if polls else math.inf

    def sleep(self, message: Sleep) -> None:
        """Fall asleep as soon as nothing holds a block."""
        error = self._refusal(message)
        if error or self.phase is SleepPhase.ASLEEP:
            self._reply(message, error=error)
        else:
            self._call, self.phase = message, SleepPhase.DRAINING
            self._deadline_at = self._clock() + message.timeout_s

    def wake_up(self, message: WakeUp) -> None:
        """Wake the pools named, or all."""
        unknown = set(message.tags) - set(TAGS)
        error = self._refusal(message)
        if unknown:
            error = f"unknown tags {', '.join(sorted(unknown))}; there are {', '.join(TAGS)}"
        if error or self.phase is SleepPhase.AWAKE:
            self._reply(message, error=error)
        else:
            self._call = message
            self._wake(message.tags or list(TAGS))

    def forget_caller(self) -> None:
        """Forget the server that asked, as it has restarted; what has begun goes on."""
        if self.phase is SleepPhase.DRAINING:
            self._call, self.phase = None, SleepPhase.AWAKE

    def on_report(self, report: SleepReport) -> None:
        """Take the report of a rank that has done what it was told, or could not."""
        self._reports.append(report)
        if len(self._reports) == self._num_ranks:
            self._conclude()

    def advance(self) -> None:
        """Do what is due."""
        if self.phase is SleepPhase.DRAINING:
            self._advance_draining()
        elif (report := self._sleeper.advance()) is not None:
            self.on_report(report)

    def _advance_draining(self) -> None:
        assert isinstance(self._call, Sleep)
        busy = "work is queued" if self._scheduler.has_work() else ""
        busy = what_holds_blocks(self._scheduler.requests.stats()) or busy
        if not busy:
            self.phase, self._reports = SleepPhase.FALLING_ASLEEP, []
            self._tell_ranks(SleepRank(level=self._call.level))
            self.on_report(self._sleeper.sleep(self._call.level))
        elif self._deadline_at is not None and self._clock() >= self._deadline_at:
            self.phase = SleepPhase.AWAKE
            self._finish(error=f"the engine cannot sleep now: {busy}")

    def _wake(self, tags: list[str]) -> None:
        self.phase, self._reports = SleepPhase.WAKING, []
        self._tell_ranks(WakeRank(tags=tags))
        report = self._sleeper.wake_up(tags)
        if report is not None:
            self.on_report(report)

    def _conclude(self) -> None:
        """Answer, as all ranks have reported."""
        errors = sorted({report.error for report in self._reports if report.error is not None})
        num_bytes = sum(report.num_bytes for report in self._reports)
        sleeping = any(report.sleeping_tags for report in self._reports)
        if self.phase is SleepPhase.FALLING_ASLEEP:
            # Also when a rank has failed: the KV cache of the others is lost.
            self._scheduler.requests.reset_prefix_cache()
            if errors:
                self._failure = "; ".join(errors)
                self._wake(list(TAGS))
                return
        self.phase = SleepPhase.ASLEEP if sleeping else SleepPhase.AWAKE
        failure, self._failure = self._failure, None
        self._finish(num_bytes, failure or "; ".join(errors) or None)

    def _refusal(self, message: Sleep | WakeUp) -> str | None:
        if not self._enabled:
            return "enable_sleep_mode is off"
        if isinstance(message, Sleep) and message.level not in (1, 2):
            return f"level is {message.level}; it is 1 or 2"
        if self.phase not in (SleepPhase.AWAKE, SleepPhase.ASLEEP):
            return (
                f"the engine is busy with another call: {self.phase.name.lower().replace('_', ' ')}"
            )
        return None

    def _finish(self, num_bytes: int = 0, error: str | None = None) -> None:
        call, self._call = self._call, None
        if call is not None:
            if error is not None:
                logger.warning("%s: %s", type(call).__name__, error)
            self._reply(call, num_bytes, error)

    def _reply(self, call: Sleep | WakeUp, num_bytes: int = 0, error: str | None = None) -> None:
        tags = self.sleeping_tags
        self._answer(
            SleepReply(call_id=call.call_id, sleeping_tags=tags, num_bytes=num_bytes, error=error)
        )


def what_holds_blocks(stats: EngineStats) -> str:
    """Return, in words, what keeps the KV cache in use; empty when nothing does."""
    counts = {
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "waiting for KV": stats.num_waiting_for_kv,
        "leased": stats.num_leased_requests,
    }
    parts = [f"{count} requests {what}" for what, count in counts.items() if count]
    if stats.num_offload_jobs:
        parts.append(f"{stats.num_offload_jobs} copies between device and host")
    if stats.num_quarantined_blocks:
        parts.append(
            f"{stats.num_quarantined_blocks} KV blocks that an abandoned transfer may still write "
            "to"
        )
    return ", ".join(parts)
