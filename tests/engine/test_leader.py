"""The order in which rank 0 does things: who is told what, and when."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pdlaunch.engine.leader import STATS_INTERVAL_S, Leader, RankParts
from pdlaunch.engine.step import StepPlan
from pdlaunch.protocol.engine import (
    AddRequest,
    EngineStats,
    FromRank,
    Outputs,
    ReadStats,
    SamplingParams,
    ToRank,
)
from pdlaunch.protocol.kv_events import KVBlocks
from pdlaunch.protocol.kv_params import TokenOutput
from pdlaunch.protocol.transfer import TransferCommand, TransferEvent
from tests.engine.fake_engine import make_scheduler
from tests.engine.real_steps import make_spec


class Recorder:
    """Server link, transfer thread and runner in one: writes down what happens, in order."""

    num_blocks = 16

    def __init__(self, *requests: ToRank) -> None:
        self.requests: list[ToRank] = list(requests)
        self.told: list[Any] = []
        self.steps: list[str] = []
        """The same with the steps between: ``launch 0``, ``collect 0``, ``Tokens``."""
        self.num_stats = 0
        self.blocks: list[KVBlocks] = []

    def receive(self) -> list[ToRank]:
        requests, self.requests = self.requests, []
        return requests

    def send(self, message: FromRank) -> None:
        if isinstance(message, Outputs):
            self.tell(message.items)
        elif isinstance(message, EngineStats):
            self.num_stats += 1
        elif isinstance(message, KVBlocks):
            self.blocks.append(message)
        else:
            self.tell([message])

    def tell(self, messages: Sequence[Any]) -> None:
        self.told += messages
        self.steps += [type(message).__name__ for message in messages]

    def submit(self, commands: list[TransferCommand]) -> None:
        self.tell(commands)

    def take_events(self) -> list[TransferEvent]:
        return []

    def launch(self, plan: StepPlan) -> StepPlan:
        if plan.scheduled:
            self.steps.append(f"launch {plan.step_id}")
        return plan

    def collect(self, plan: StepPlan) -> list[TokenOutput | None]:
        self.steps.append(f"collect {plan.step_id}")
        return [TokenOutput(token_id=9) for row in plan.scheduled if row.sample]


def make_leader(
    recorder: Any,
    clock: Callable[[], float] = time.monotonic,
    *,
    record: Callable[[Sequence[int]], None] = lambda _: None,
    **changes: object,
) -> Leader:
    spec = make_spec("unused", max_num_seqs=2, **changes)
    rank = RankParts(spec, recorder, recorder, clock=clock)
    return Leader(rank, make_scheduler(spec), recorder, record=record)


def add(name: str, max_tokens: int, prompt: Sequence[int] = (1, 2, 3), **fields: Any) -> AddRequest:
    sampling = SamplingParams(max_tokens=max_tokens)
    return AddRequest(
        request_id=name,  # type: ignore[arg-type]
        prompt_token_ids=list(prompt),
        sampling=sampling,
        **fields,
    )


def run(leader: Leader, recorder: Recorder) -> None:
    while leader.wait_s() == 0 or recorder.requests:
        leader.turn()


def test_a_lease_is_granted_before_anyone_hears_of_it() -> None:
    recorder = Recorder(add("a/0", 1, do_remote_decode=True))
    run(make_leader(recorder), recorder)
    assert recorder.steps == ["launch 0", "collect 0", "GrantLease", "RequestFinished"]
    grant, finished = recorder.told
    assert finished.remote_kv.lease_id == grant.lease_id


def test_a_steps_tokens_leave_while_the_next_one_runs() -> None:
    recorder = Recorder(add("a", 3))
    run(make_leader(recorder, async_scheduling=True), recorder)
    assert recorder.steps == [
        *("launch 0", "launch 1", "collect 0", "Tokens"),
        *("launch 2", "collect 1", "Tokens"),
        *("collect 2", "RequestFinished"),
    ]


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_each_step_is_noted_before_anybody_begins_it_and_its_end_too(runs_ahead: bool) -> None:
    order: list[Any] = []

    class Steps(Recorder):
        def launch(self, plan: StepPlan) -> StepPlan:
            order.append("launch")
            return plan

    recorder = Steps(*(add(str(number), 2, origin=number) for number in (4, 5)))
    leader = make_leader(recorder, record=order.append, async_scheduling=runs_ahead)
    for _ in range(6):
        leader.turn()
    noted = [sorted({*order[at - 1]}) for at, item in enumerate(order) if item == "launch"]
    assert noted == [[4, 5], [4, 5], []], "the last launch computes nothing and frees the rows"
    assert order[-1] == []


def test_statistics_go_out_every_second_and_at_once_for_who_asks() -> None:
    now_s = 50.0
    recorder = Recorder()
    leader = make_leader(recorder, clock=lambda: now_s)
    for asked, passed_s, num_stats in [
        ([], 0.0, 1),
        ([], 0.0, 1),
        ([ReadStats(), ReadStats()], 0.0, 2),
        ([], 0.0, 2),
        ([], STATS_INTERVAL_S, 3),
    ]:
        recorder.requests, now_s = list(asked), now_s + passed_s
        leader.turn()
        assert recorder.num_stats == num_stats
