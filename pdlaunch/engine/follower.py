"""Runs the step loop of a TP group's ranks other than 0: do what rank 0 says, and report."""

from __future__ import annotations

import time
from collections.abc import Callable

import zmq

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.channels import FollowerChannel
from pdlaunch.engine.offload.worker import OffloadWorker
from pdlaunch.engine.runner import ModelRunner
from pdlaunch.engine.sleep import POLL_S, RankSleeper
from pdlaunch.engine.step import SleepRank, StepDone, StepPlan, StopRank, WakeRank
from pdlaunch.protocol.control import SleepState
from pdlaunch.transfer.thread import TransferThread

IDLE_WAIT_S = 1.0


class Follower:
    """Turns the step loop of one rank other than 0; ``turn`` is one round of it."""

    ready = True
    """Rank 0 waits for all others before it is ready, and so does the engine."""

    def __init__(
        self,
        *,
        spec: EngineSpec,
        tp_rank: int,
        runner: ModelRunner,
        transfer: TransferThread,
        leader: FollowerChannel,
        offload: OffloadWorker | None,
        announce: Callable[[SleepState], None],
    ) -> None:
        """Begin with no row in use; ``announce`` tells the supervisor whether peers may read this
        memory.
        """
        self._tp_rank = tp_rank
        self._runner = runner
        self._transfer = transfer
        self._leader = leader
        self._offload = offload
        self._sleeper = RankSleeper(
            runner,
            transfer,
            announce,
            peers_timeout_s=spec.kv_transfer.handshake_timeout_s,
            clock=time.monotonic,
        )
        self.stopped = False

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        return [self._leader.socket]

    def wait_s(self) -> float:
        """Return how long the loop may sleep when no socket wakes it."""
        return POLL_S if self._sleeper.waits_for_peers else IDLE_WAIT_S

    def turn(self) -> None:
        """Receive, run the steps that rank 0 has planned, report what has ended here."""
        report = self._sleeper.advance()
        for message in self._leader.receive():
            match message:
                case StepPlan():
                    self._run(message)
                case SleepRank(level=level):
                    report = self._sleeper.sleep(level)
                case WakeRank(tags=tags):
                    report = self._sleeper.wake_up(tags)
                case StopRank():
                    self.stopped = True
                    return
        # Ends are reported by themselves, whether or not a step runs: rank 0 counts the ranks.
        events = self._transfer.take_events()
        jobs = [] if self._offload is None else self._offload.take_finished()
        if report is not None or events or jobs:
            self._leader.report(
                StepDone(tp_rank=self._tp_rank, sleep=report, events=events, jobs=jobs)
            )

    def close(self) -> None:
        """Do nothing: only rank 0 has somebody to stop."""

    def _run(self, plan: StepPlan) -> None:
        # As on rank 0 commands come before the step: a lease is granted on what earlier steps
        # computed.
        self._transfer.submit(plan.commands)
        if self._offload is not None:
            self._offload.submit(plan.jobs)
        # Nobody collects the step here: rank 0 learns of its own end, which needs ours.
        self._runner.launch(plan)
