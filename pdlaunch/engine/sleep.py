"""Puts an engine to sleep and wakes it. Rank 0 decides when; each rank disconnects its peers and
frees its memory.

Work that takes several turns of the step loop is a generator: each ``yield`` ends a turn.
"""

import logging
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from pdlaunch.engine.memory.pools import TAGS
from pdlaunch.engine.runner import ModelRunner
from pdlaunch.engine.scheduler import Scheduler
from pdlaunch.engine.step import SleepRank, SleepReport, WakeRank
from pdlaunch.errors import ConfigError, MemoryPoolError, TransferError
from pdlaunch.protocol.control import SleepState
from pdlaunch.protocol.engine import EngineStats, Sleep, SleepReply, WakeUp
from pdlaunch.transfer.thread import TransferThread

logger = logging.getLogger(__name__)

# Time limit for the transfer thread to release its memory, or to register it again
TRANSFER_TIMEOUT_S = 20.0
# Time limit for peers to unmap this rank's memory; the device gets the memory back only then
UNMAP_TIMEOUT_S = 5.0
POLL_S = 0.05  # time between checks whether the engine is idle, or peers have shaken hands


@dataclass(eq=False)
class RankSleeper:
    """Puts one rank to sleep and wakes it up. A turn may take seconds, because no request runs."""

    memory: ModelRunner
    transfer: TransferThread
    announce: Callable[[SleepState], None]  # informs the supervisor
    peers_timeout_s: float  # for peers to reconnect
    clock: Callable[[], float]
    report: SleepReport | None = None  # sent once peers have shaken hands
    peers_until_at: float = 0.0  # 0: this rank waits for no peers

    @property
    def sleeping_tags(self) -> list[str]:
        return sorted(self.memory.sleeping_tags)

    @property
    def is_busy(self) -> bool:
        return self.report is not None

    def begin(self, message: SleepRank | WakeRank) -> None:
        num_bytes, error, self.peers_until_at = 0, None, 0.0
        try:
            if isinstance(message, SleepRank):
                num_bytes = self._sleep(message.level)
            else:
                num_bytes = self._wake_up(message.tags)
        except (MemoryPoolError, ConfigError) as found:
            error = str(found)
        self.report = SleepReport(
            num_bytes=num_bytes, sleeping_tags=self.sleeping_tags, error=error
        )

    def advance(self) -> SleepReport | None:
        """Return the report of the last message, once all peers have shaken hands or time is up."""
        if self.peers_until_at and not self.transfer.connected:
            if self.clock() < self.peers_until_at:
                return None
            logger.warning("after waking up, some peers did not shake hands in time")
        self.peers_until_at = 0.0
        report, self.report = self.report, None
        return report

    def _sleep(self, level: int) -> int:
        """Disconnect peers, then free the memory. After a MemoryPoolError, the rank is awake."""
        if self.memory.sleeping_tags:
            return 0
        try:
            self.transfer.suspend(TRANSFER_TIMEOUT_S)
        except TransferError as error:
            raise MemoryPoolError(str(error)) from None
        # Peers see this in the registry and unmap the memory. Not announced earlier, because a rank
        # whose transfers do not end stays awake.
        self.announce(SleepState(state="sleeping"))
        if not self.transfer.wait_unmapped(UNMAP_TIMEOUT_S):
            logger.warning(
                "a peer still maps the KV cache after %g s; the memory is freed once unmapped",
                UNMAP_TIMEOUT_S,
            )
        try:
            return self.memory.sleep(level)
        except MemoryPoolError:
            self._reconnect()
            raise

    def _wake_up(self, tags: list[str]) -> int:
        """Allocate the memory again and accept peers. Raises MemoryPoolError or ConfigError."""
        was_asleep = bool(self.memory.sleeping_tags)
        num_bytes = self.memory.wake_up(tags)
        if was_asleep and not self.memory.sleeping_tags:
            self._reconnect()
            self.peers_until_at = self.clock() + self.peers_timeout_s
        return num_bytes

    def _reconnect(self) -> None:
        """Accept peers again. Raises TransferError, which ends the rank."""
        self.transfer.resume(TRANSFER_TIMEOUT_S)
        self.announce(SleepState(state="awake"))


@dataclass(eq=False)
class SleepCoordinator:
    """Handles one Sleep or WakeUp at a time in rank 0, and answers each with one SleepReply."""

    sleeper: RankSleeper
    num_ranks: int
    notify_ranks: Callable[[SleepRank | WakeRank], None]
    scheduler: Scheduler
    answer: Callable[[SleepReply], None]
    clock: Callable[[], float]
    work: Generator[None, None, None] | None = None
    reports: list[SleepReport] = field(default_factory=list)
    computes: bool = True  # requests may be scheduled, because no memory is asleep

    @property
    def sleeping_tags(self) -> list[str]:
        """Return the tags whose memory is asleep; never empty while the engine refuses requests."""
        return [] if self.computes else self.sleeper.sleeping_tags or list(TAGS)

    def wait_s(self) -> float:
        return math.inf if self.work is None else POLL_S

    def begin(self, call: Sleep | WakeUp) -> None:
        if self.work is not None:
            self._reply(call, error="the engine still handles another sleep or wake-up")
        elif self.computes == isinstance(call, WakeUp):
            self._reply(call)  # the engine is in the wanted state already
        else:
            # Starts at the end of this turn, after ended requests have freed their blocks.
            self.work = self._fall_asleep(call) if isinstance(call, Sleep) else self._wake_up(call)

    def forget_caller(self) -> None:
        """Drop the call of a server that has restarted, unless the ranks have begun it."""
        if self.computes:
            self.work = None

    def on_report(self, report: SleepReport) -> None:
        self.reports.append(report)

    def advance(self) -> None:
        # ``self`` stands for the end of the generator, which yields None.
        if self.work is not None and next(self.work, self) is self:
            self.work = None

    def _fall_asleep(self, call: Sleep) -> Generator[None, None, None]:
        deadline_at = self.clock() + call.timeout_s
        while busy := self._what_is_busy():
            if self.clock() >= deadline_at:
                self._reply(call, error=f"the engine cannot sleep now: {busy}")
                return
            yield
        # Refuse new requests from here on, because the KV cache is freed.
        self.computes = False
        num_bytes, error = yield from self._notify_all(SleepRank(level=call.level))
        # Even if a rank has failed, because the other ranks have lost their KV cache.
        self.scheduler.requests.reset_prefix_cache()
        if error is not None:
            num_bytes, _ = yield from self._notify_all(WakeRank(tags=list(TAGS)))
        self._reply(call, num_bytes, error)

    def _wake_up(self, call: WakeUp) -> Generator[None, None, None]:
        reply = yield from self._notify_all(WakeRank(tags=call.tags or list(TAGS)))
        self._reply(call, *reply)

    def _notify_all(
        self, message: SleepRank | WakeRank
    ) -> Generator[None, None, tuple[int, str | None]]:
        """Send the message to all ranks; return the sum of their bytes, and their errors."""
        self.reports = []
        self.notify_ranks(message)
        self.sleeper.begin(message)
        while (report := self.sleeper.advance()) is None:
            yield
        self.reports.append(report)
        while len(self.reports) < self.num_ranks:
            yield
        self.computes = not any(report.sleeping_tags for report in self.reports)
        errors = {report.error for report in self.reports if report.error is not None}
        num_bytes = sum(report.num_bytes for report in self.reports)
        return num_bytes, "; ".join(sorted(errors)) or None

    def _what_is_busy(self) -> str:
        holds = what_holds_blocks(self.scheduler.requests.stats())
        return holds or ("work is queued" if self.scheduler.has_work() else "")

    def _reply(self, call: Sleep | WakeUp, num_bytes: int = 0, error: str | None = None) -> None:
        if error is not None:
            logger.warning("%s: %s", type(call).__name__, error)
        tags = self.sleeping_tags
        self.answer(
            SleepReply(call_id=call.call_id, sleeping_tags=tags, num_bytes=num_bytes, error=error)
        )


def what_holds_blocks(stats: EngineStats) -> str:
    """Return a text that names what still uses KV blocks; empty if nothing does."""
    counts = {
        "requests running": stats.num_running,
        "requests waiting": stats.num_waiting,
        "requests waiting for KV blocks": stats.num_waiting_for_kv,
        "requests under lease": stats.num_leased_requests,
        "copies between device and host": stats.num_offload_jobs,
        "KV blocks that an abandoned transfer may still write to": stats.num_quarantined_blocks,
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)
