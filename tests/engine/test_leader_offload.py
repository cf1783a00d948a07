"""Rank 0 and the host tier: jobs go to every rank, and an end counts when the last rank has told
it.
"""

from __future__ import annotations

from typing import Any

from pdlaunch.engine.kvcache.groups import make_groups
from pdlaunch.engine.leader import Leader
from pdlaunch.engine.offload.jobs import JobFinished, OffloadJob
from pdlaunch.engine.offload.planner import OffloadPlanner
from pdlaunch.engine.offload.tier import HostTier
from pdlaunch.engine.scheduler import Scheduler
from pdlaunch.engine.step import StepDone, StepPlan
from pdlaunch.protocol.engine import AddRequest, SamplingParams
from tests.engine.hand_scheduler import make_spec
from tests.engine.test_leader import Recorder, make_scheduler


class FakeOffload:
    """Rank 0's copies: each ends before somebody looks."""

    def __init__(self) -> None:
        self.jobs: list[OffloadJob] = []
        self.ended: list[JobFinished] = []

    def submit(self, jobs: list[OffloadJob]) -> None:
        self.jobs += jobs
        self.ended += [JobFinished(job.job_id, True, num_bytes=10) for job in jobs]

    def take_finished(self) -> list[JobFinished]:
        ended, self.ended = self.ended, []
        return ended


class FakeFollower:
    """Rank 1: its copies end when the test says so."""

    complete = True

    def __init__(self) -> None:
        self.jobs: list[OffloadJob] = []
        self.reports: list[StepDone] = []

    def send(self, plan: StepPlan) -> None:
        self.jobs += plan.jobs

    def receive(self) -> list[StepDone]:
        reports, self.reports = self.reports, []
        return reports

    def end_all(self) -> None:
        ends = [JobFinished(job.job_id, True, num_bytes=10) for job in self.jobs]
        self.reports.append(StepDone(tp_rank=1, jobs=ends))


def make_leader(recorder: Any, offload: Any, follower: Any) -> tuple[Leader, Scheduler]:
    planner = OffloadPlanner(make_groups([None]), 4, HostTier(8))
    scheduler = make_scheduler(tp_size=2, offload=planner)
    leader = Leader(
        spec=make_spec("unused", tensor_parallel_size=2),
        runner=recorder,
        transfer=recorder,
        scheduler=scheduler,
        server=recorder,
        followers=follower,
        offload=offload,
    )
    return leader, scheduler


def test_blocks_are_free_when_the_last_rank_has_stored_its_heads() -> None:
    request = AddRequest(
        request_id="a", prompt_token_ids=[*range(9)], sampling=SamplingParams(max_tokens=2)
    )
    recorder, offload, follower = Recorder([request]), FakeOffload(), FakeFollower()
    leader, scheduler = make_leader(recorder, offload, follower)
    while leader.wait_s() == 0 or recorder.requests or offload.ended:
        leader.turn()
    assert [job.group_sizes for job in offload.jobs] == [[2]]
    assert follower.jobs == offload.jobs
    stats = scheduler.requests.stats()
    assert (stats.num_offload_jobs, stats.num_free_blocks, stats.num_running) == (1, 14, 0)
    follower.end_all()
    leader.turn()
    stats = scheduler.requests.stats()
    assert (stats.num_offload_jobs, stats.num_free_blocks, stats.offload_stored_bytes) == (
        0,
        16,
        20,
    )
