"""Runs the step loops: ``Leader`` schedules, runs, postprocesses and answers the server in rank 0;
``Follower`` runs the plans of rank 0 in the other ranks of a TP group, whose reports are merged.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import msgspec
import zmq

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.offload.planner import JobFinished
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.engine.runner import LaunchedStep, ModelRunner
from pdlaunch.engine.scheduler import Scheduler
from pdlaunch.engine.sleep import POLL_S, RankSleeper, SleepCoordinator
from pdlaunch.engine.step import (
    FromRankZero,
    SleepRank,
    StepDone,
    StepPlan,
    StopRank,
    WakeRank,
    from_rank_zero,
    step_done,
)
from pdlaunch.machine.network import tcp_endpoint
from pdlaunch.protocol import engine
from pdlaunch.protocol.control import SleepState
from pdlaunch.protocol.ids import LeaseId, PullId
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.transfer import (
    LeaseEnd,
    LeaseEnded,
    PullDrained,
    PullFinished,
    TransferEvent,
    join_paths,
)
from pdlaunch.transfer.thread import TransferThread

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 1.0
LOOPBACK = "127.0.0.1"  # a server and all ranks of an engine run on one host

T = TypeVar("T")


class ServerLink:
    """Holds rank 0's end of the channel to its server, the process that sent the last Hello."""

    def __init__(self, context: SecureContext) -> None:
        self.socket, self.endpoint = context.listen(zmq.ROUTER, tcp_endpoint(LOOPBACK, 0))
        self._server: bytes | None = None

    @property
    def connected(self) -> bool:
        return self._server is not None

    def receive(self) -> list[engine.ToRank]:
        messages: list[engine.ToRank] = []
        for identity, *_, frame in drain(self.socket):
            message = engine.to_rank.decode(frame)
            if isinstance(message, engine.Hello):
                self._server = identity
            if identity == self._server:
                messages.append(message)
        return messages

    def send(self, message: engine.FromRank) -> None:
        """Send to the server, if it has connected. While the server restarts, messages are lost."""
        if self._server is not None:
            self.socket.send_multipart([self._server, engine.from_rank.encode(message)])


class LeaderChannel:
    """Sends rank 0's messages to the other ranks, and receives their reports."""

    def __init__(self, context: SecureContext, tp_size: int) -> None:
        self.socket, self.endpoint = context.listen(zmq.ROUTER, tcp_endpoint(LOOPBACK, 0))
        self._num_followers = tp_size - 1
        self._followers: dict[int, bytes] = {}

    @property
    def complete(self) -> bool:
        return len(self._followers) == self._num_followers

    def send(self, message: FromRankZero) -> None:
        frame = from_rank_zero.encode(message)
        for identity in self._followers.values():
            self.socket.send_multipart([identity, frame])

    def receive(self) -> list[StepDone]:
        reports = []
        for identity, *_, frame in drain(self.socket):
            reports.append(step_done.decode(frame))
            self._followers[reports[-1].tp_rank] = identity
        return reports


class RankReports:
    """Merges the ranks' reports: a block is moved only when each rank has moved its KV heads."""

    def __init__(self, tp_size: int) -> None:
        self._tp_size = tp_size
        self._reports: dict[tuple[type, LeaseId | PullId | int], list[Any]] = {}
        self._num_drained: Counter[PullId] = Counter()

    def add(self, report: JobFinished | TransferEvent) -> JobFinished | TransferEvent | None:
        """Return the merged report of all ranks; None until the last rank has reported."""
        match report:
            case JobFinished():
                if reports := self._complete(report, report.job_id):
                    return _merged(JobFinished, JobFinished.__slots__, reports)
            case LeaseEnded():
                if reports := self._complete(report, report.lease_id):
                    # If the lease expired on one rank, it counts as expired for the engine.
                    reasons = {one.reason for one in reports}
                    names: tuple[LeaseEnd, ...] = ("expired", "released", "pulled")
                    reason = next(name for name in names if name in reasons)
                    return LeaseEnded(lease_id=report.lease_id, reason=reason)
            case PullFinished():
                if reports := self._complete(report, report.pull_id):
                    merged = _merged(PullFinished, PullFinished.__struct_fields__, reports)
                    # A rank with a READ in flight sends a PullDrained later, perhaps before the
                    # last rank reports. If all such ranks have, no READ is in flight any more.
                    num_in_flight = sum(one.in_flight for one in reports)
                    self._num_drained[report.pull_id] -= num_in_flight
                    merged.in_flight = not self._is_drained(report.pull_id)
                    return merged
            case PullDrained():
                self._num_drained[report.pull_id] += 1
                return report if self._is_drained(report.pull_id) else None
        return None

    def _complete(self, report: object, name: LeaseId | PullId | int) -> list[Any] | None:
        key = type(report), name
        reports = self._reports.setdefault(key, [])
        reports.append(report)
        return self._reports.pop(key) if len(reports) == self._tp_size else None

    def _is_drained(self, pull_id: PullId) -> bool:
        """Return True if each rank that left a READ in flight has sent its PullDrained."""
        # Below 0 while a PullDrained is missing, above 0 while a PullFinished is.
        if self._num_drained[pull_id] == 0:
            del self._num_drained[pull_id]
            return True
        return False


# How to merge the ranks' values of a field
_MERGED: dict[str, Callable[[Sequence[Any]], Any]] = {
    "pull_id": min,
    "job_id": min,
    # If one rank has failed, the engine computes the prompt itself. It cannot pull the lease again,
    # because the other ranks have used up their shares.
    "ok": all,
    "error": lambda errors: "; ".join(sorted({*filter(None, errors)})),
    "in_flight": any,
    "blames_pair": any,
    "num_bytes": sum,
    "seconds": max,
    "read_s": max,
    "prefill": max,
    "path": join_paths,
    # Retries of READs are summed over the ranks. A cause of failure counts once for each pull.
    "counts": lambda of_ranks: {
        name: (sum if name == "kv_pull_retries" else max)([one.get(name, 0) for one in of_ranks])
        for name in {*chain(*of_ranks)}
    },
    "reports": lambda of_ranks: {rank: told for one in of_ranks for rank, told in one.items()},
    "failed_host_ids": lambda of_ranks: sorted({*chain(*of_ranks)}),
}


def _merged(kind: type[T], names: Iterable[str], reports: Sequence[object]) -> T:
    # A field without an entry in ``_MERGED`` raises KeyError instead of being lost silently.
    return kind(
        **{name: _MERGED[name]([getattr(report, name) for report in reports]) for name in names}
    )


def drain(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    """Receive all messages that have arrived, each as its frames; never blocks."""
    frames = []
    while True:
        try:
            frames.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return frames


@dataclass(slots=True)
class RankParts:
    """Holds the parts that every rank has."""

    spec: EngineSpec
    runner: ModelRunner
    transfer: TransferThread
    offload: OffloadWorker | None = None
    announce: Callable[[SleepState], None] = lambda _: None  # reports sleep to the supervisor
    clock: Callable[[], float] = time.monotonic
    sleeper: RankSleeper = field(init=False)

    def __post_init__(self) -> None:
        timeout_s = self.spec.kv_transfer.handshake_timeout_s
        self.sleeper = RankSleeper(
            self.runner, self.transfer, self.announce, peers_timeout_s=timeout_s, clock=self.clock
        )

    def submit(self, plan: StepPlan) -> None:
        # Before the step is launched: its leases are on blocks that earlier steps computed.
        self.transfer.submit(plan.commands)
        if self.offload is not None:
            self.offload.submit(plan.jobs)

    def take_ends(self) -> tuple[list[TransferEvent], list[JobFinished]]:
        jobs = [] if self.offload is None else self.offload.take_finished()
        return self.transfer.take_events(), jobs


@dataclass(eq=False)
class Leader:
    """Runs the step loop of an engine; ``turn`` is one iteration: schedule, run, postprocess.

    On a GPU (``spec.async_scheduling``) a turn leaves its step running, so that the host prepares
    the next step while the device computes::

        in flight before   schedule                   run             postprocess
        no step            N                          launch N        on a CPU: collect N
        step N             N + 1, ahead of N's end    launch N + 1    collect N
        step N             collect N, then N + 1      launch N + 1
        step N             an empty plan                              collect N
    """

    # Always False: only the supervisor stops rank 0, which then stops the other ranks
    stopped = False

    rank: RankParts
    scheduler: Scheduler
    server: ServerLink
    followers: LeaderChannel | None = None
    # Stores which requests are in flight, where this outlives the process.
    record: Callable[[Sequence[int]], None] = lambda _: None

    def __post_init__(self) -> None:
        self._runner = self.rank.runner
        self._requests = self.scheduler.requests
        tp_size = self.rank.spec.tensor_parallel_size
        self._reports = RankReports(tp_size)
        # Steps launched and not collected, oldest first. At most one is left between turns.
        self._in_flight: deque[tuple[StepPlan, LaunchedStep]] = deque()
        self._stats_due_at = 0.0
        self._sleep = SleepCoordinator(
            self.rank.sleeper,
            num_ranks=tp_size,
            notify_ranks=self._notify_followers,
            scheduler=self.scheduler,
            answer=self.server.send,
            clock=self.rank.clock,
        )

    @property
    def ready(self) -> bool:
        return self.server.connected and (self.followers is None or self.followers.complete)

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        followers = [] if self.followers is None else [self.followers.socket]
        return [self.server.socket, *followers]

    def wait_s(self) -> float:
        if self.scheduler.has_work():
            return 0.0
        return min(STATS_INTERVAL_S, self._sleep.wait_s())

    def turn(self) -> None:
        self._receive()
        plan = self._schedule()
        self._run(plan)
        # On a GPU the step that was launched just now is left running.
        num_left = 1 if self.rank.spec.async_scheduling and plan.scheduled else 0
        while len(self._in_flight) > num_left:
            self._postprocess()
        self._sleep.advance()
        self._send_stats()

    def close(self) -> None:
        self._notify_followers(StopRank())

    def _schedule(self) -> StepPlan:
        """Plan the next step; wait for the step in flight only if its result is needed."""
        if self._in_flight:
            plan = self.scheduler.schedule_ahead()
            if plan is not None:
                return plan
            self._postprocess()
            # A request that arrived during this wait must not wait for another step.
            self._receive()
        return self.scheduler.schedule()

    def _run(self, plan: StepPlan) -> None:
        """Send the plan to all ranks and launch it; send outputs to the server."""
        # Commands go out first: an answer must not reach a decode engine before the lease that it
        # names is granted.
        self._submit(plan)
        self._send_outputs()
        # Even if the plan computes nothing, the runner must free its rows before they are reused.
        if not plan.is_empty:
            launched = self._runner.launch(plan)
            if plan.scheduled:
                self._in_flight.append((plan, launched))

    def _postprocess(self) -> None:
        plan, launched = self._in_flight.popleft()
        self.scheduler.postprocess(plan, self._runner.collect(launched))
        # Leases go out before the answers that name them, as in ``_run``, and both go out before
        # the next plan is made.
        self._submit(self.scheduler.hand_over())
        self._send_outputs()

    def _receive(self) -> None:
        for message in self.server.receive():
            self._on_request(message)
        events, jobs = self.rank.take_ends()
        for report in self.followers.receive() if self.followers is not None else ():
            events += report.events
            jobs += report.jobs
            if report.sleep is not None:
                self._sleep.on_report(report.sleep)
        for each in (*events, *jobs):
            match self._reports.add(each):
                case None:
                    pass
                case JobFinished() as job:
                    self._requests.on_job_finished(job)
                case event:
                    self._requests.on_transfer_event(event)

    def _on_request(self, message: engine.ToRank) -> None:
        match message:
            case engine.Hello():
                # The server is a new process and knows none of the requests here.
                self._requests.abort_all()
                self._requests.take_outputs()
                self._sleep.forget_caller()
                welcome = engine.Welcome(
                    num_blocks=self._runner.num_blocks,
                    max_model_len=self._requests.max_model_len,
                    sleeping_tags=self._sleep.sleeping_tags,
                )
                self.server.send(welcome)
                self._send_blocks(every=True)
            case engine.AddRequest() if not self._sleep.computes:
                refusal = engine.RequestFinished(
                    request_id=message.request_id, reason="error", error="the engine is asleep"
                )
                self.server.send(engine.Outputs(items=[refusal]))
            case engine.AddRequest():
                self._requests.add(message)
            case engine.Sleep() | engine.WakeUp():
                self._sleep.begin(message)
            case engine.AbortRequest():
                self._requests.abort(message.request_id)
            case engine.ReadStats():
                self._stats_due_at = 0.0  # sends them at the end of this turn
            case engine.CheckIntegrity():
                self.server.send(self._integrity(message.call_id))

    def _integrity(self, call_id: int) -> engine.IntegrityReport:
        error = None
        try:
            self._requests.check_integrity()
        except AssertionError as found:
            logger.exception("the owners of the KV blocks are inconsistent")
            error = str(found) or repr(found)
        return engine.IntegrityReport(call_id=call_id, error=error, stats=self._requests.stats())

    def _notify_followers(self, message: FromRankZero) -> None:
        if self.followers is not None:
            self.followers.send(message)

    def _submit(self, plan: StepPlan) -> None:
        # The supervisor blames a rank's death on the requests in the record. Write it before any
        # rank begins the step, and for an empty plan too: collected steps are not to blame.
        self.record(self._requests.batch.marks())
        if not plan.is_empty:
            self._notify_followers(plan)
            self.rank.submit(plan)

    def _send_outputs(self) -> None:
        self._send_blocks()
        if outputs := self._requests.take_outputs():
            self.server.send(engine.Outputs(items=outputs))

    def _send_blocks(self, *, every: bool = False) -> None:
        if (blocks := self._requests.take_blocks(every=every)) is not None:
            self.server.send(blocks)

    def _send_stats(self) -> None:
        """Send statistics every second, because the server takes long silence for a hung rank."""
        now_at = self.rank.clock()
        if now_at < self._stats_due_at:
            return
        self._stats_due_at = now_at + STATS_INTERVAL_S
        histograms = self._requests.histograms.shown()
        self.server.send(msgspec.structs.replace(self._requests.stats(), histograms=histograms))


class Follower:
    """Runs the step loop of one rank other than 0; ``turn`` is one iteration."""

    ready = True  # rank 0 waits for all other ranks before it is ready itself

    def __init__(self, rank: RankParts, tp_rank: int, leader: zmq.Socket[bytes]) -> None:
        self._rank = rank
        self._tp_rank = tp_rank
        self._leader = leader
        self.sockets = [leader]
        self.stopped = False
        # The first message announces this rank to rank 0.
        leader.send(step_done.encode(StepDone(tp_rank=tp_rank)))

    def wait_s(self) -> float:
        return POLL_S if self._rank.sleeper.is_busy else STATS_INTERVAL_S

    def turn(self) -> None:
        for frames in drain(self._leader):
            match from_rank_zero.decode(frames[-1]):
                case StepPlan() as plan:
                    self._rank.submit(plan)
                    # Not collected here: rank 0's step cannot end before this rank's step has.
                    self._rank.runner.launch(plan)
                case SleepRank() | WakeRank() as message:
                    self._rank.sleeper.begin(message)
                case StopRank():
                    self.stopped = True
                    return
        sleep = self._rank.sleeper.advance()
        # Reported whether or not a step runs: rank 0 waits for the reports of all ranks.
        events, jobs = self._rank.take_ends()
        if sleep is not None or events or jobs:
            done = StepDone(tp_rank=self._tp_rank, sleep=sleep, events=events, jobs=jobs)
            self._leader.send(step_done.encode(done))

    def close(self) -> None:
        """Do nothing: only rank 0 stops other ranks."""
