"""Puts an engine to sleep and wakes it: rank 0 decides when; every rank lets go of its peers and
memory.

Work that takes several turns of the step loop is a generator: each ``yield`` ends a turn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator

from pdlaunch.engine.memory.pools import TAGS
from pdlaunch.engine.runner import ModelRunner
from pdlaunch.engine.scheduler import Scheduler
from pdlaunch.engine.step import SleepRank, SleepReport, WakeRank
from pdlaunch.errors import ConfigError, MemoryPoolError, TransferError
from pdlaunch.protocol.control import SleepState
from pdlaunch.protocol.engine import EngineStats, Sleep, SleepReply, WakeUp
from pdlaunch.transfer.thread import TransferThread

logger = logging.getLogger(__name__)

# Longest time that the transfer thread may take to let go of its memory, or to take it again
TRANSFER_TIMEOUT_S = 20.0
# Longest time that peers get to unmap this rank's memory, which the device gets back then
UNMAP_TIMEOUT_S = 5.0
POLL_S = 0.05  # time between two looks at whether the engine is idle, or peers are back


class RankSleeper:
    """Puts one rank to sleep and wakes it up; a turn may take seconds, as nothing runs."""

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
        self._work: Generator[None, None, SleepReport] | None = None

    @property
    def sleeping_tags(self) -> list[str]:
        return sorted(self._memory.sleeping_tags)

    @property
    def is_busy(self) -> bool:
        return self._work is not None

    def begin(self, message: SleepRank | WakeRank) -> None:
        self._work = self._obey(message)

    def advance(self) -> SleepReport | None:
        if self._work is None:
            return None
        try:
            next(self._work)
        except StopIteration as end:
            self._work = None
            report: SleepReport = end.value
            return report
        return None

    def _obey(self, message: SleepRank | WakeRank) -> Generator[None, None, SleepReport]:
        num_bytes, error = 0, None
        try:
            if isinstance(message, SleepRank):
                num_bytes = self._sleep(message.level)
            else:
                num_bytes = yield from self._wake_up(message.tags)
        except (MemoryPoolError, ConfigError) as found:
            error = str(found)
        return SleepReport(num_bytes=num_bytes, sleeping_tags=self.sleeping_tags, error=error)

    def _sleep(self, level: int) -> int:
        """Let peers go, then give the memory back. Raises MemoryPoolError; then it is awake."""
        if self._memory.sleeping_tags:
            return 0
        try:
            self._transfer.suspend(TRANSFER_TIMEOUT_S)
        except TransferError as error:
            raise MemoryPoolError(str(error)) from None
        # Peers see this in the registry and unmap the memory. Only now: a rank whose transfers do
        # not end stays awake.
        self._announce(SleepState(state="sleeping"))
        if not self._transfer.wait_unmapped(UNMAP_TIMEOUT_S):
            logger.warning(
                "a peer has not unmapped the KV cache within %g s: its memory is free when it has",
                UNMAP_TIMEOUT_S,
            )
        try:
            return self._memory.sleep(level)
        except MemoryPoolError:
            self._reconnect()
            raise

    def _wake_up(self, tags: list[str]) -> Generator[None, None, int]:
        """Take memory back, let peers come, and wait until all have shaken hands or their time is
        up. Raises MemoryPoolError or ConfigError.
        """
        was_asleep = bool(self._memory.sleeping_tags)
        num_bytes = self._memory.wake_up(tags)
        if was_asleep and not self._memory.sleeping_tags:
            self._reconnect()
            deadline_at = self._clock() + self._peers_timeout_s
            while not self._transfer.connected:
                if self._clock() >= deadline_at:
                    logger.warning("not every peer has shaken hands in time after waking up")
                    break
                yield
        return num_bytes

    def _reconnect(self) -> None:
        """Let peers come again. Raises TransferError; then the rank has to be replaced."""
        self._transfer.resume(TRANSFER_TIMEOUT_S)
        self._announce(SleepState(state="awake"))


class SleepCoordinator:
    """Does rank 0's part: one Sleep or WakeUp at a time, each answered with one SleepReply."""

    def __init__(
        self,
        sleeper: RankSleeper,
        *,
        num_ranks: int,
        tell_ranks: Callable[[SleepRank | WakeRank], None],
        scheduler: Scheduler,
        answer: Callable[[SleepReply], None],
        clock: Callable[[], float],
    ) -> None:
        self._sleeper = sleeper
        self._num_ranks = num_ranks
        self._tell_ranks = tell_ranks
        self._scheduler = scheduler
        self._answer = answer
        self._clock = clock
        self._work: Generator[None, None, None] | None = None
        self._reports: list[SleepReport] = []
        self.computes = True
        """Requests may be scheduled: all memory is there."""

    @property
    def sleeping_tags(self) -> list[str]:
        """Return the tags whose memory sleeps; not empty while the engine serves nothing."""
        return [] if self.computes else self._sleeper.sleeping_tags or list(TAGS)

    def wait_s(self) -> float:
        return math.inf if self._work is None else POLL_S

    def begin(self, call: Sleep | WakeUp) -> None:
        if self._work is not None:
            self._reply(call, error="the engine is busy with another call")
        elif self.computes == isinstance(call, WakeUp):
            self._reply(call)  # it is so already
        else:
            # Starts at the end of this turn, when ended requests have freed their blocks.
            self._work = self._fall_asleep(call) if isinstance(call, Sleep) else self._wake_up(call)

    def forget_caller(self) -> None:
        """Drop the call of a server that has restarted, unless the ranks have begun it."""
        if self.computes:
            self._work = None

    def on_report(self, report: SleepReport) -> None:
        self._reports.append(report)

    def advance(self) -> None:
        # ``self`` stands for the end of the generator, which yields None.
        if self._work is not None and next(self._work, self) is self:
            self._work = None

    def _fall_asleep(self, call: Sleep) -> Generator[None, None, None]:
        deadline_at = self._clock() + call.timeout_s
        while busy := self._what_is_busy():
            if self._clock() >= deadline_at:
                self._reply(call, error=f"the engine cannot sleep now: {busy}")
                return
            yield
        # Refuse new requests from here on: the KV cache goes with the memory.
        self.computes = False
        num_bytes, error = yield from self._tell_all(SleepRank(level=call.level))
        # Also when a rank has failed: the KV cache of the others is lost.
        self._scheduler.requests.reset_prefix_cache()
        if error is not None:
            num_bytes, _ = yield from self._tell_all(WakeRank(tags=list(TAGS)))
        self._reply(call, num_bytes, error)

    def _wake_up(self, call: WakeUp) -> Generator[None, None, None]:
        reply = yield from self._tell_all(WakeRank(tags=call.tags or list(TAGS)))
        self._reply(call, *reply)

    def _tell_all(
        self, message: SleepRank | WakeRank
    ) -> Generator[None, None, tuple[int, str | None]]:
        """Have all ranks obey; return the bytes of all, and their errors."""
        self._reports = []
        self._tell_ranks(message)
        self._sleeper.begin(message)
        while (report := self._sleeper.advance()) is None:
            yield
        self._reports.append(report)
        while len(self._reports) < self._num_ranks:
            yield
        self.computes = not any(report.sleeping_tags for report in self._reports)
        errors = {report.error for report in self._reports if report.error is not None}
        num_bytes = sum(report.num_bytes for report in self._reports)
        return num_bytes, "; ".join(sorted(errors)) or None

    def _what_is_busy(self) -> str:
        holds = what_holds_blocks(self._scheduler.requests.stats())
        return holds or ("work is queued" if self._scheduler.has_work() else "")

    def _reply(self, call: Sleep | WakeUp, num_bytes: int = 0, error: str | None = None) -> None:
        if error is not None:
            logger.warning("%s: %s", type(call).__name__, error)
        tags = self.sleeping_tags
        self._answer(
            SleepReply(call_id=call.call_id, sleeping_tags=tags, num_bytes=num_bytes, error=error)
        )


def what_holds_blocks(stats: EngineStats) -> str:
    """Return, in words, what keeps the KV cache in use; empty when nothing does."""
    counts = {
        "requests running": stats.num_running,
        "requests waiting": stats.num_waiting,
        "requests waiting for KV": stats.num_waiting_for_kv,
        "requests leased": stats.num_leased_requests,
        "copies between device and host": stats.num_offload_jobs,
        "KV blocks that an abandoned transfer may still write to": stats.num_quarantined_blocks,
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)
