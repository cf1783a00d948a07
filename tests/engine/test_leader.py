"""The order in which rank 0 tells others what a step gave."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.kvcache.groups import make_groups
from pdlaunch.engine.leader import STATS_INTERVAL_S, Leader
from pdlaunch.engine.lifecycle import RequestLifecycle
from pdlaunch.engine.offload.planner import OffloadPlanner
from pdlaunch.engine.scheduler import Scheduler
from pdlaunch.engine.step import StepOutput, StepPlan
from pdlaunch.protocol.engine import (
    AddRequest,
    EngineStats,
    FromRank,
    Outputs,
    ReadStats,
    SamplingParams,
    ToRank,
)
from pdlaunch.protocol.kv_params import TokenOutput
from pdlaunch.protocol.transfer import GrantLease, TransferCommand, TransferEvent
from tests.engine.hand_scheduler import make_spec


class Recorder:
    """Server link, transfer worker and runner in one: writes down who was told what, in order."""

    num_blocks = 16

    def __init__(self, requests: list[ToRank]) -> None:
        self.requests = requests
        self.told: list[object] = []
        self.num_stats = 0

    def receive(self) -> list[ToRank]:
        requests, self.requests = self.requests, []
        return requests

    def send(self, message: FromRank) -> None:
        if isinstance(message, Outputs):
            self.told += message.items
        self.num_stats += isinstance(message, EngineStats)

    def submit(self, commands: list[TransferCommand]) -> None:
        self.told += commands

    def take_events(self) -> list[TransferEvent]:
        return []

    def launch(self, plan: StepPlan) -> StepPlan:
        return plan

    def collect(self, plan: StepPlan) -> StepOutput:
        return StepOutput(
            step_id=plan.step_id,
            tokens=[TokenOutput(token_id=9) for row in plan.scheduled if row.sample],
        )


def make_scheduler(*, tp_size: int = 1, offload: OffloadPlanner | None = None) -> Scheduler:
    """Of one full group, with 16 blocks of 4 tokens."""
    return Scheduler(
        RequestLifecycle(
            groups=make_groups([None]),
            num_blocks=16,
            block_size=4,
            max_num_seqs=2,
            max_model_len=64,
            enable_prefix_caching=True,
            model_digest="m",
            kv_transfer=KVTransferSettings(),
            local=("engine", "127.0.0.1", 1, tp_size),
            offload=offload,
        ),
        max_num_batched_tokens=64,
    )


def make_leader(
    recorder: Any,
    clock: Callable[[], float] = time.monotonic,
    *,
    record: Callable[[Sequence[int]], None] = lambda _: None,
    **changes: object,
) -> Leader:
    scheduler = make_scheduler()
    return Leader(
        spec=make_spec("unused", **changes),
        runner=recorder,
        transfer=recorder,
        scheduler=scheduler,
        server=recorder,
        followers=None,
        record=record,
        clock=clock,
    )


def test_a_lease_is_granted_before_anyone_hears_of_it() -> None:
    request = AddRequest(
        request_id="a/0",
        prompt_token_ids=[1, 2, 3],
        sampling=SamplingParams(max_tokens=1),
        do_remote_decode=True,
    )
    recorder = Recorder([request])
    leader = make_leader(recorder)
    while leader.wait_s() == 0 or recorder.requests:
        leader.turn()
    kinds = [type(message).__name__ for message in recorder.told]
    assert kinds == ["GrantLease", "RequestFinished"]
    grant, finished = recorder.told
    assert isinstance(grant, GrantLease)
    assert finished.remote_kv.lease_id == grant.lease_id  # type: ignore[attr-defined]


def test_statistics_go_out_at_once_for_who_asks() -> None:
    recorder = Recorder([])
    leader = make_leader(recorder, clock=lambda: 50.0)
    for asked, num_stats in [([], 1), ([], 1), ([ReadStats(), ReadStats()], 2), ([], 2)]:
        recorder.requests = asked
        leader.turn()
        assert recorder.num_stats == num_stats


def test_statistics_go_out_every_second_also_when_nothing_is_new() -> None:
    now_s = 50.0
    recorder = Recorder([])
    leader = make_leader(recorder, clock=lambda: now_s)
    for _ in range(2):
        leader.turn()
    assert recorder.num_stats == 1
    for _ in range(3):
        now_s += STATS_INTERVAL_S
        leader.turn()
    assert recorder.num_stats == 4
