"""A model whose KV cache can be looked into.

The KV of a token in one group is the pair (group, chain of all tokens up to it). A row may read
only what stands for its own tokens, so any block that is stale, foreign, unwritten or out of the
window shows at once. The next token follows from the chain. The device works as late as it may: a
step that was launched writes and reads its blocks when it is collected.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.kvcache.groups import KVCacheGroup
from pdlaunch.engine.step import NewBlocks, NewRow, ScheduledRow, StepPlan
from pdlaunch.protocol.engine import SamplingParams
from pdlaunch.protocol.kv_params import TokenOutput

VOCAB_SIZE = 7
KV = tuple[int, int]


def extend_chain(chain: list[int], token_ids: Sequence[int]) -> list[int]:
    for token_id in token_ids:
        chain.append(hash((chain[-1] if chain else 0, token_id, len(chain))))
    return chain


def next_token(chain: list[int], sampling: SamplingParams, num_output_tokens: int) -> int:
    token_id = chain[-1] % VOCAB_SIZE
    while num_output_tokens < sampling.min_tokens and token_id in sampling.stop_token_ids:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def expected_output(prompt: Sequence[int], sampling: SamplingParams, limit: int) -> list[int]:
    """What the model answers when it has the engine for itself."""
    chain, output = extend_chain([], prompt), []
    while len(output) < limit:
        output.append(next_token(chain, sampling, len(output)))
        extend_chain(chain, output[-1:])
        if output[-1] in sampling.stop_token_ids and len(output) >= sampling.min_tokens:
            break
    return output


def has_penalty(sampling: SamplingParams) -> bool:
    own = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty
    return own != (0.0, 0.0, 1.0)


@dataclass
class FakeRow:
    chain: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    block_tables: list[dict[int, int]]
    token_ids: list[int] = field(default_factory=list)
    num_unknown: int = 0
    """Tokens after ``token_ids`` that launched steps draw."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_unknown


@dataclass
class FakeStep:
    """What a launched step computes: the rows and block tables as they were then."""

    plan: StepPlan
    rows: list[FakeRow]
    tables: list[list[dict[int, int]]]


class FakeRunner:
    """Executes plans as ``ModelRunner`` does; ``samples`` only on rank 0. ``expects``: another rank
    that gets rank 0's tokens.
    """

    samples = False

    def __init__(
        self, groups: Sequence[KVCacheGroup], num_blocks: int, spec: EngineSpec, *, expects: bool
    ):
        self.groups = groups
        self.block_size = block_size = spec.block_size
        self.max_num_seqs = spec.max_num_seqs
        self.expects = expects
        self.memory: list[list[KV | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.rows: dict[int, FakeRow] = {}
        self.num_computed_tokens = 0
        self.nan_after: int | None = None
        """Rows whose prompt begins with this token have NaN for logits."""
        self.launched: deque[FakeStep] = deque()

    def launch(self, plan: StepPlan) -> FakeStep:
        for row in plan.freed_rows:
            freed = self.rows.pop(row)
            assert all(freed is not used for step in self.launched for used in step.rows), (
                "a step in flight needs the row"
            )
        for new in plan.new_rows:
            self._add(new)
        for tokens in plan.new_tokens:
            self._write_tokens(self.rows[tokens.row], tokens.position, tokens.token_ids)
        for blocks in plan.new_blocks:
            self._add_blocks(blocks)
        assert len({item.row for item in plan.scheduled}) == len(plan.scheduled)
        rows = [self.rows[item.row] for item in plan.scheduled]
        for item, row in zip(plan.scheduled, rows, strict=True):
            end = item.num_computed_tokens + item.num_tokens
            assert item.num_tokens > 0
            assert end <= row.num_tokens, "a rank is asked to compute a token that it does not know"
            assert item.sample == (end == row.num_tokens)
            assert not (row.num_unknown and has_penalty(row.sampling)), (
                "the penalty is of a token that nobody knows"
            )
            row.num_unknown += item.sample and (self.samples or self.expects)
        step = FakeStep(plan, rows, [[dict(table) for table in row.block_tables] for row in rows])
        if plan.scheduled:
            self.launched.append(step)
        return step

    def collect(
        self, step: FakeStep, drawn: Sequence[TokenOutput | None] = ()
    ) -> list[TokenOutput | None]:
        """``drawn``: by rank 0, for a rank that ``expects``."""
        assert not step.rows or self.launched.popleft() is step, (
            "steps end in the order in which they were launched"
        )
        parts = list(zip(step.plan.scheduled, step.rows, step.tables, strict=True))
        written: set[tuple[int, int]] = set()
        for item, row, tables in parts:
            self._write_kv(item, row, tables, written)
        for item, row, tables in parts:
            self._check_reads(item, row, tables)
        sampled = [row for item, row, _ in parts if item.sample]
        if self.expects:
            for row, token in zip(sampled, drawn, strict=True):
                self._learn(row, token.token_id)
        return [self._sample(row) for row in sampled if self.samples]

    def slot(self, tables: list[dict[int, int]], group: int, position: int) -> tuple[int, int]:
        return tables[group][position // self.block_size], position % self.block_size

    def _add(self, new: NewRow) -> None:
        assert 0 <= new.row < self.max_num_seqs
        assert new.row not in self.rows
        row = FakeRow([], new.num_prompt_tokens, new.sampling, [{} for _ in self.groups])
        self._write_tokens(row, 0, new.token_ids)
        self.rows[new.row] = row

    def _write_tokens(self, row: FakeRow, position: int, token_ids: list[int]) -> None:
        assert position <= len(row.token_ids)
        known = row.token_ids[position:]
        assert known == token_ids[: len(known)], "a token that was known before has changed"
        row.token_ids[position:] = token_ids
        extend_chain(row.chain, row.token_ids[len(row.chain) :])

    def _add_blocks(self, blocks: NewBlocks) -> None:
        table = self.rows[blocks.row].block_tables[blocks.group]
        for index, block_id in enumerate(blocks.block_ids, blocks.first_block_index):
            assert index not in table
            table[index] = block_id

    def _write_kv(
        self,
        item: ScheduledRow,
        row: FakeRow,
        tables: list[dict[int, int]],
        written: set[tuple[int, int]],
    ) -> None:
        end = item.num_computed_tokens + item.num_tokens
        self.num_computed_tokens += item.num_tokens
        for group in range(len(self.groups)):
            for position in range(item.num_computed_tokens, end):
                place = self.slot(tables, group, position)
                assert place not in written, "two rows write to one slot"
                written.add(place)
                self.memory[place[0]][place[1]] = (group, row.chain[position])

    def _check_reads(self, item: ScheduledRow, row: FakeRow, tables: list[dict[int, int]]) -> None:
        """The first query of a chunk sees furthest back, the last one furthest ahead."""
        for group, kind in enumerate(self.groups):
            start = (
                0
                if kind.sliding_window is None
                else max(0, item.num_computed_tokens - kind.sliding_window + 1)
            )
            for position in range(start, item.num_computed_tokens + item.num_tokens):
                block_id, slot = self.slot(tables, group, position)
                assert self.memory[block_id][slot] == (group, row.chain[position]), (
                    "a row reads what is not its own"
                )

    def _sample(self, row: FakeRow) -> TokenOutput | None:
        if row.token_ids[0] == self.nan_after:
            self._learn(row, 0)
            return None
        token_id = next_token(row.chain, row.sampling, len(row.token_ids) - row.num_prompt_tokens)
        self._learn(row, token_id)
        return TokenOutput(token_id=token_id, logprob=-0.5)

    def _learn(self, row: FakeRow, token_id: int) -> None:
        row.num_unknown -= 1
        self._write_tokens(row, len(row.token_ids), [token_id])
