"""Defines the messages from rank 0 to the other ranks (plans, sleep, stop), and their reports.

The runner keeps a row for each request (its tokens, block tables and sampling state), so that a
plan carries only changes. All ranks of the TP group run the same ``StepPlan``.
"""

from pdlaunch.engine.offload.planner import JobFinished, OffloadJob
from pdlaunch.protocol.engine import SamplingParams
from pdlaunch.protocol.ids import RequestId
from pdlaunch.protocol.transfer import TransferCommand, TransferEvent
from pdlaunch.protocol.wire import Codec, Message


class NewRow(Message, tag=False):
    """Adds a request to the batch, also after a preemption; it has no blocks yet."""

    row: int  # 0 <= row < max_num_seqs; free until now
    request_id: RequestId
    token_ids: list[int]  # prompt and output so far
    num_prompt_tokens: int
    sampling: SamplingParams


class NewBlocks(Message, tag=False):
    """Adds entries to a row's block table in one KV cache group."""

    row: int
    group: int
    first_block_index: int  # logical index of the first id within the request
    block_ids: list[int]


class RowTokens(Message, tag=False):
    """Carries the tokens that rank 0 has sampled for a row to the row's copies on all ranks."""

    row: int
    position: int  # index of the first of them in the request
    token_ids: list[int]


class ScheduledRow(Message, tag=False):
    """Says what one row computes: ``num_tokens`` tokens, from ``num_computed_tokens`` on."""

    row: int
    num_computed_tokens: int
    num_tokens: int
    sample: bool  # draw the token after these, because it is not known yet
    # For each of the first ``num_scored`` tokens, return the log-probability of the token after it
    num_scored: int = 0


class StepPlan(Message):
    """Holds all work of a rank for one step. Commands and jobs start before the step computes."""

    step_id: int
    freed_rows: list[int] = []
    new_rows: list[NewRow] = []
    new_tokens: list[RowTokens] = []
    new_blocks: list[NewBlocks] = []
    scheduled: list[ScheduledRow] = []  # empty: nothing to compute, only commands or jobs
    commands: list[TransferCommand] = []
    jobs: list[OffloadJob] = []  # copies between device and host

    @property
    def is_empty(self) -> bool:
        return not (
            self.scheduled or self.commands or self.jobs or self.freed_rows or self.new_rows
        )


class SleepRank(Message):
    """Asks a rank to disconnect its peers and free its memory; answered with a SleepReport."""

    level: int


class WakeRank(Message):
    """Asks a rank to allocate the memory of these tags again; answered with a SleepReport."""

    tags: list[str]


class SleepReport(Message, tag=False):
    num_bytes: int = 0
    sleeping_tags: list[str] = []
    error: str | None = None


class StopRank(Message):
    """Asks a rank other than 0 to end."""


class StepDone(Message):
    """Reports ended transfers, offload jobs and changes of sleep of a rank other than 0."""

    tp_rank: int
    events: list[TransferEvent] = []
    jobs: list[JobFinished] = []
    sleep: SleepReport | None = None


FromRankZero = StepPlan | StopRank | SleepRank | WakeRank

from_rank_zero: Codec[FromRankZero] = Codec(FromRankZero)
step_done: Codec[StepDone] = Codec(StepDone)
