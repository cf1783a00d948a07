"""Defines the messages of one step: what the scheduler asks of every rank, and what comes back.

The runner keeps a row for each request (its tokens, block tables and sampling state), so that a
step carries only what is new. Rank 0 sends the same ``StepPlan`` to all ranks of the TP group.
"""

from __future__ import annotations

from pdlaunch.engine.offload.planner import JobFinished, OffloadJob
from pdlaunch.protocol.engine import SamplingParams
from pdlaunch.protocol.ids import RequestId
from pdlaunch.protocol.transfer import TransferCommand, TransferEvent
from pdlaunch.protocol.wire import Codec, Message


class NewRow(Message, tag=False):
    """Says that a request enters the batch, also again after preemption; it has no blocks yet."""

    row: int  # 0 <= row < max_num_seqs; free until now
    request_id: RequestId
    token_ids: list[int]  # prompt and output so far
    num_prompt_tokens: int
    sampling: SamplingParams


class NewBlocks(Message, tag=False):
    """Gives entries of a row's block table in one KV cache group."""

    row: int
    group: int
    first_block_index: int  # logical index within the request of the first id
    block_ids: list[int]


class RowTokens(Message, tag=False):
    """Gives tokens of a row that this rank has not sampled itself in its last step."""

    row: int
    position: int  # index of the first of them in the request
    token_ids: list[int]


class ScheduledRow(Message, tag=False):
    """Says what one row computes: ``num_tokens`` tokens, from ``num_computed_tokens`` on."""

    row: int
    num_computed_tokens: int
    num_tokens: int
    sample: bool  # draw the next token, because the last of these is the last known one
    num_scored: int = 0  # of these, the first ones: tell the log-probability of the token after


class StepPlan(Message):
    """Says everything that a rank has to do for one step, in the order of the fields."""

    step_id: int
    freed_rows: list[int] = []
    new_rows: list[NewRow] = []
    new_tokens: list[RowTokens] = []
    new_blocks: list[NewBlocks] = []
    scheduled: list[ScheduledRow] = []  # empty: nothing to compute, only commands or jobs
    commands: list[TransferCommand] = []
    # Copies between device and host that begin before this step computes
    jobs: list[OffloadJob] = []

    @property
    def is_empty(self) -> bool:
        return not (
            self.scheduled or self.commands or self.jobs or self.freed_rows or self.new_rows
        )


class SleepRank(Message):
    """Tells a rank to let peers go and give the memory back; answered with a SleepReport."""

    level: int


class WakeRank(Message):
    """Tells a rank to take the memory of these tags; answered with a SleepReport."""

    tags: list[str]


class SleepReport(Message, tag=False):
    num_bytes: int = 0
    sleeping_tags: list[str] = []
    error: str | None = None


class StopRank(Message):
    """Tells the other ranks to leave."""


class StepDone(Message):
    """Reports the end of transfers, offload jobs or a change of sleep on a rank other than 0."""

    tp_rank: int
    events: list[TransferEvent] = []
    jobs: list[JobFinished] = []
    sleep: SleepReport | None = None


FromRankZero = StepPlan | StopRank | SleepRank | WakeRank

from_rank_zero: Codec[FromRankZero] = Codec(FromRankZero)
step_done: Codec[StepDone] = Codec(StepDone)
