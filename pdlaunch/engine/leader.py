"""Rank 0 of an engine: schedule, run with all ranks, postprocess, answer the server."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.launched_step import LaunchedStep
from pdlaunch.engine.runner import ModelRunner
from pdlaunch.engine.scheduler import Scheduler
from pdlaunch.engine.server_link import ServerLink
from pdlaunch.engine.sleep import RankSleeper, SleepCoordinator
from pdlaunch.engine.step import SleepRank, StepPlan, WakeRank
from pdlaunch.engine.tp_channel import LeaderChannel
from pdlaunch.engine.tp_events import EventAggregator
from pdlaunch.offload.jobs import JobMerger
from pdlaunch.offload.worker import OffloadWorker
from pdlaunch.protocol.control import SleepState
from pdlaunch.protocol.engine import (
    AbortRequest,
    AddRequest,
    CheckIntegrity,
    Hello,
    IntegrityReport,
    Outputs,
    RequestFinished,
    SetReaders,
    Sleep,
    ToRank,
    WakeUp,
    Welcome,
)
from pdlaunch.protocol.ids import EngineId, lease_of
from pdlaunch.transfer.thread import TransferThread

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 1.0


class Leader:
    """The step loop of an engine; ``turn`` is one round of it. With ``spec.async_scheduling`` it
    leaves a step running.
    """

    def __init__(
        self,
        *,
        spec: EngineSpec,
        engine_id: EngineId,
        incarnation: int,
        runner: ModelRunner,
        transfer: TransferThread,
        scheduler: Scheduler,
        server: ServerLink,
        followers: LeaderChannel | None,
        offload: OffloadWorker | None = None,
        announce: Callable[[SleepState], None] = lambda _: None,
        record: Callable[[Sequence[int]], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``announce`` tells the supervisor whether peers may read this rank's memory; ``record``
        notes for whom steps run.
        """
        self._welcome = Welcome(
            engine_id=engine_id,
            rank_incarnation=incarnation,
            max_model_len=spec.max_model_len,
            num_blocks=runner.num_blocks,
            block_size=spec.block_size,
        )
        self._runner = runner
        self._transfer = transfer
        self._scheduler = scheduler
        self._requests = scheduler.requests
        self._server = server
        self._followers = followers
        self._offload = offload
        self._jobs = JobMerger(spec.tensor_parallel_size)
        self._events = EventAggregator(spec.tensor_parallel_size)
        self._clock = clock
        self._runs_ahead = spec.async_scheduling
        self._running: tuple[StepPlan, LaunchedStep] | None = None
        self._record = record
        self._stats_due_s = 0.0
        self._sleep = SleepCoordinator(
            RankSleeper(
                runner,
                transfer,
                announce,
                peers_timeout_s=spec.kv_transfer.handshake_timeout_s,
                clock=clock,
            ),
            enabled=spec.enable_sleep_mode,
            num_ranks=spec.tensor_parallel_size,
            tell_ranks=self._tell_followers,
            scheduler=scheduler,
            answer=server.send,
            clock=clock,
        )

    @property
    def ready(self) -> bool:
        """Every rank of the TP group is in the loop."""
        return self._followers is None or self._followers.complete

    def wait_s(self) -> float:
        """How long the loop may sleep when no socket wakes it."""
        if self._scheduler.has_work():
            return 0.0
        return min(STATS_INTERVAL_S, self._sleep.wait_s())

    def rehearse(self) -> None:
        """Nothing is to be done, but a step is likely to begin soon: be quick then."""
        assert self._running is None
        self._runner.rehearse()

    def turn(self) -> None:
        """Receive, schedule, send what the step before gave, run, postprocess."""
        self._receive()
        if not self._run_ahead():
            if self._running is not None:
                self._collect()
                # What came while we waited is not to wait for another step.
                self._receive()
            self._run()
        self._sleep.advance()
        self._send_stats()

    def _run(self) -> None:
        """The next step, when the one before has ended."""
        plan = self._scheduler.schedule()
        # First: an answer must not reach a decode engine before the lease that it speaks of is
        # granted.
        self._submit(plan)
        if self._runs_ahead and all(item.num_tokens == 1 for item in plan.scheduled):
            # Launched at once, and the device is idle.
            self._running = self._launch(plan)
            self._send_outputs()
        else:
            self._send_outputs()
            self._running = self._launch(plan)
        if self._running is not None and not self._runs_ahead:
            self._collect()
        self._requests.register_pending()

    def _run_ahead(self) -> bool:
        """Launch the next step while one runs, and collect that one. False: it has to be collected
        first.
        """
        plan = None if self._running is None else self._scheduler.schedule_ahead()
        if plan is None:
            return False
        self._submit(plan)
        self._send_outputs()
        following = self._launch(plan)
        self._collect()
        self._running = following
        self._requests.register_pending()
        return True

    def _launch(self, plan: StepPlan) -> tuple[StepPlan, LaunchedStep] | None:
        """None: there is nothing to wait for."""
        if _is_empty(plan):
            return None
        launched = self._runner.launch(plan)
        return (plan, launched) if plan.scheduled else None

    def _collect(self) -> None:
        """Wait for the step that runs and take in what it gave."""
        assert self._running is not None
        plan, launched = self._running
        self._running = None
        self._scheduler.postprocess(plan, self._runner.collect(launched))
        # Readers of a lease may be waiting for it: before anything is sent.
        self._submit(self._scheduler.hand_over())
        # At once: the next plan is not to hold up the answers.
        self._send_outputs()

    def _receive(self) -> None:
        for message in self._server.receive():
            self._on_request(message)
        self._receive_events()

    def _on_request(self, message: ToRank) -> None:
        match message:
            case Hello():
                self._requests.abort_all()
                self._requests.take_outputs()
                self._sleep.forget_caller()
                self._server.send(
                    msgspec.structs.replace(self._welcome, sleeping_tags=self._sleep.sleeping_tags)
                )
            case AddRequest() if not self._sleep.computes:
                refusal = RequestFinished(
                    request_id=message.request_id, reason="error", error="the engine sleeps"
                )
                self._server.send(Outputs(items=[refusal]))
            case AddRequest():
                self._requests.add(message)
            case Sleep():
                self._sleep.sleep(message)
            case WakeUp():
                self._sleep.wake_up(message)
            case AbortRequest():
                self._requests.abort(message.request_id)
            case SetReaders():
                self._requests.set_readers(lease_of(message.request_id), message.num_readers)
            case CheckIntegrity():
                self._server.send(self._integrity(message.call_id))

    def _integrity(self, call_id: int) -> IntegrityReport:
        try:
            self._requests.check_integrity()
        except AssertionError as error:
            logger.exception("the books of the KV blocks are wrong")
            return IntegrityReport(
                call_id=call_id, error=str(error) or repr(error), stats=self._requests.stats()
            )
        return IntegrityReport(call_id=call_id, error=None, stats=self._requests.stats())

    def _receive_events(self) -> None:
        events = self._transfer.take_events()
        jobs = [] if self._offload is None else self._offload.take_finished()
        if self._followers is not None:
            for report in self._followers.receive():
                events.extend(report.events)
                jobs.extend(report.jobs)
                if report.sleep is not None:
                    self._sleep.on_report(report.sleep)
        for event in events:
            for merged in self._events.add(event):
                self._requests.on_transfer_event(merged)
        for job in jobs:
            if (ended := self._jobs.add(job)) is not None:
                self._requests.on_job_finished(ended)

    def _tell_followers(self, message: SleepRank | WakeRank) -> None:
        if self._followers is not None:
            self._followers.send(message)

    def _submit(self, plan: StepPlan) -> None:
        # Before any rank begins the step, and when one has been collected.
        self._record(self._requests.in_flight.marks())
        if _is_empty(plan):
            return
        if self._followers is not None:
            self._followers.send(plan)
        self._transfer.submit(plan.commands)
        if self._offload is not None:
            self._offload.submit(plan.jobs)

    def _send_outputs(self) -> None:
        if outputs := self._requests.take_outputs():
            self._server.send(Outputs(items=outputs))

    def _send_stats(self) -> None:
        """Also when nothing is new: the server takes silence for a rank that hangs."""
        now_s = self._clock()
        if now_s < self._stats_due_s:
            return
        self._stats_due_s = now_s + STATS_INTERVAL_S
        self._server.send(self._requests.stats())


def _is_empty(plan: StepPlan) -> bool:
    return not (plan.scheduled or plan.commands or plan.jobs or plan.freed_rows or plan.new_rows)
