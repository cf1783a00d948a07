"""Runs the step loops: ``Leader`` schedules, runs, postprocesses and answers the server in rank 0;
``Follower`` runs the plans of rank 0 in the other ranks of a TP group.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import zmq

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.channels import LeaderChannel, RankReports, ServerLink, drain
from pdlaunch.engine.offload.planner import JobFinished
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.engine.runner import LaunchedStep, ModelRunner
from pdlaunch.engine.scheduler import Scheduler
from pdlaunch.engine.sleep import POLL_S, RankSleeper, SleepCoordinator
from pdlaunch.engine.step import (
    SleepRank,
    StepDone,
    StepPlan,
    StopRank,
    WakeRank,
    from_rank_zero,
    step_done,
)
from pdlaunch.protocol import engine
from pdlaunch.protocol.control import SleepState
from pdlaunch.protocol.transfer import TransferEvent
from pdlaunch.transfer.thread import TransferThread

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 1.0


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

    def __init__(
        self,
        rank: RankParts,
        scheduler: Scheduler,
        server: ServerLink,
        followers: LeaderChannel | None = None,
        record: Callable[[Sequence[int]], None] = lambda _: None,
    ) -> None:
        """``record`` stores which requests are in flight, where this outlives the process."""
        self._rank = rank
        self._runner = rank.runner
        self._scheduler = scheduler
        self._requests = scheduler.requests
        self._server = server
        self._followers = followers
        tp_size = rank.spec.tensor_parallel_size
        self._reports = RankReports(tp_size)
        # Steps launched and not collected, oldest first. At most one is left between turns.
        self._in_flight: deque[tuple[StepPlan, LaunchedStep]] = deque()
        self._record = record
        self._stats_due_at = 0.0
        self._sleep = SleepCoordinator(
            rank.sleeper,
            num_ranks=tp_size,
            notify_ranks=self._notify_followers,
            scheduler=scheduler,
            answer=server.send,
            clock=rank.clock,
        )

    @property
    def ready(self) -> bool:
        return self._server.connected and (self._followers is None or self._followers.complete)

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        followers = [] if self._followers is None else [self._followers.socket]
        return [self._server.socket, *followers]

    def wait_s(self) -> float:
        if self._scheduler.has_work():
            return 0.0
        return min(STATS_INTERVAL_S, self._sleep.wait_s())

    def turn(self) -> None:
        """Receive messages, then schedule, run and postprocess one step."""
        self._receive()
        plan = self._schedule()
        self._run(plan)
        # On a GPU the step that was launched just now is left running.
        num_left = 1 if self._rank.spec.async_scheduling and plan.scheduled else 0
        while len(self._in_flight) > num_left:
            self._postprocess()
        self._sleep.advance()
        self._send_stats()

    def close(self) -> None:
        self._notify_followers(StopRank())

    def _schedule(self) -> StepPlan:
        """Plan the next step; wait for the step in flight only if its result is needed."""
        if self._in_flight:
            plan = self._scheduler.schedule_ahead()
            if plan is not None:
                return plan
            self._postprocess()
            # A request that arrived during this wait must not wait for another step.
            self._receive()
        return self._scheduler.schedule()

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
        self._scheduler.postprocess(plan, self._runner.collect(launched))
        # Leases go out before the answers that name them, as in ``_run``, and both go out before
        # the next plan is made.
        self._submit(self._scheduler.hand_over())
        self._send_outputs()

    def _receive(self) -> None:
        for message in self._server.receive():
            self._on_request(message)
        events, jobs = self._rank.take_ends()
        for report in self._followers.receive() if self._followers is not None else ():
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
                self._server.send(welcome)
                self._send_blocks(every=True)
            case engine.AddRequest() if not self._sleep.computes:
                refusal = engine.RequestFinished(
                    request_id=message.request_id, reason="error", error="the engine is asleep"
                )
                self._server.send(engine.Outputs(items=[refusal]))
            case engine.AddRequest():
                self._requests.add(message)
            case engine.Sleep() | engine.WakeUp():
                self._sleep.begin(message)
            case engine.AbortRequest():
                self._requests.abort(message.request_id)
            case engine.ReadStats():
                self._stats_due_at = 0.0  # sends them at the end of this turn
            case engine.CheckIntegrity():
                self._server.send(self._integrity(message.call_id))

    def _integrity(self, call_id: int) -> engine.IntegrityReport:
        error = None
        try:
            self._requests.check_integrity()
        except AssertionError as found:
            logger.exception("the owners of the KV blocks are inconsistent")
            error = str(found) or repr(found)
        return engine.IntegrityReport(call_id=call_id, error=error, stats=self._requests.stats())

    def _notify_followers(self, message: StepPlan | SleepRank | WakeRank | StopRank) -> None:
        if self._followers is not None:
            self._followers.send(message)

    def _submit(self, plan: StepPlan) -> None:
        # The supervisor blames a rank's death on the requests in the record. Write it before any
        # rank begins the step, and for an empty plan too: collected steps are not to blame.
        self._record(self._requests.batch.marks())
        if not plan.is_empty:
            self._notify_followers(plan)
            self._rank.submit(plan)

    def _send_outputs(self) -> None:
        self._send_blocks()
        if outputs := self._requests.take_outputs():
            self._server.send(engine.Outputs(items=outputs))

    def _send_blocks(self, *, every: bool = False) -> None:
        if (blocks := self._requests.take_blocks(every=every)) is not None:
            self._server.send(blocks)

    def _send_stats(self) -> None:
        """Send statistics every second, because the server takes long silence for a hung rank."""
        now_at = self._rank.clock()
        if now_at < self._stats_due_at:
            return
        self._stats_due_at = now_at + STATS_INTERVAL_S
        histograms = self._requests.histograms.shown()
        self._server.send(msgspec.structs.replace(self._requests.stats(), histograms=histograms))


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
        """Run the plans received from rank 0; report ended transfers, copies and sleep."""
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
