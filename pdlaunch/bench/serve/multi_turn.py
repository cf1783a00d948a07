"""``pdlaunch bench serve --multi-turn`` holds chats whose every turn sends all that was said
before, and shows what prefix caches are worth.

::

    turn 1   [first message             ]-> output          all conversations, then
    turn 2   [first message][output][new]-> output          all conversations, then ..

Each conversation waits for all others between two of its turns, so that its blocks are the ones not
used for longest: where the working set (``working_set_tokens``) is larger than a cache, that cache
has lost them. There is no time to think. What a conversation says depends on the seed and its
number alone; what is answered is sent back as the token ids that came.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from pdlaunch.bench.serve.engine_counters import (
    EngineCounters,
    TierRow,
    counters_when,
    read_counters,
    tier_rows,
)
from pdlaunch.bench.serve.goals import Goals
from pdlaunch.bench.serve.loads import random_prompt
from pdlaunch.bench.serve.progress import BenchProgress, ProgressText
from pdlaunch.bench.serve.row import BenchRun, count_errors, quantile_ms, summarise
from pdlaunch.bench.serve.sweep import warm_up
from pdlaunch.bench.serve.target import BenchTarget, open_target
from pdlaunch.bench.serve.timed_completion import TimedCompletion, complete


class MultiTurnOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Sets what one multi-turn benchmark sends to a deployment."""

    url: str = ""
    api_key: str | None = None
    num_conversations: int = 16
    num_turns: int = 4
    first_tokens: int = 128
    """Length of the first message."""
    turn_tokens: int = 32
    """Length of every further message."""
    output_tokens: int = 32
    concurrency: int = 4
    max_token_id: int = 30_000
    seed: int | None = None
    goals: Goals = Goals()
    request_timeout_s: float = 600.0

    @property
    def longest_prompt_tokens(self) -> int:
        """Return the length of the last turn's prompt."""
        return self.first_tokens + (self.num_turns - 1) * (self.output_tokens + self.turn_tokens)

    @property
    def working_set_tokens(self) -> int:
        """Return the length of all conversations when they end."""
        return self.num_conversations * (self.longest_prompt_tokens + self.output_tokens)


class TurnRow(msgspec.Struct, frozen=True, kw_only=True):
    """Holds the figures of one turn of all conversations; None where nothing was measured."""

    turn: int
    prompt_tokens: int
    num_requests: int
    num_errors: int
    """Failed requests; their conversations have ended."""
    seconds: float
    ttft_ms_median: float | None
    ttft_ms_p99: float | None
    itl_ms_median: float | None
    cached_share: float | None
    """Share of the prompt tokens that the engine of the first token did not compute, as the answers
    say.
    """
    output_tokens_per_s: float
    goodput_per_s: float | None = None
    """Messages a second whose answer met the goals; None without goals."""
    good_share: float | None = None
    """Share of all messages of the turn whose answer did."""
    errors: list[str] = []


class MultiTurnReport(msgspec.Struct, frozen=True, kw_only=True):
    """Holds all turns, and what the engines' caches say of them together."""

    num_conversations: int
    working_set_tokens: int
    seed: int
    turns: list[TurnRow]
    tiers: list[TierRow]


class _Conversation:
    """Keeps what was said so far; ``history`` ends with an answer, or is empty."""

    def __init__(self, options: MultiTurnOptions, seed: int, number: int) -> None:
        self._options = options
        self._source = random.Random(f"{seed}/{number}")
        self.history: list[int] = []
        self.has_failed = False

    async def say(self, target: BenchTarget) -> TimedCompletion:
        """Take one turn. A conversation whose turn fails cannot go on."""
        options = self._options
        num_tokens = options.turn_tokens if self.history else options.first_tokens
        self.history += random_prompt(self._source, options.max_token_id, num_tokens)
        completion = await complete(
            target.session, target.model, self.history, options.output_tokens
        )
        if completion.error is None and len(completion.token_ids) != options.output_tokens:
            completion.error = (
                "the answer does not tell its token ids (return_token_ids), so that nobody can go "
                "on from it"
            )
        self.has_failed = completion.error is not None
        self.history += completion.token_ids
        return completion


async def bench_multi_turn(
    options: MultiTurnOptions,
    progress: ProgressText,
    on_turn: Callable[[BenchRun], None] = lambda _: None,
) -> MultiTurnReport:
    """Run every turn of all conversations, one turn after the other; ``on_turn`` gets each with its
    requests.

    Raises PdlaunchError when the deployment cannot be used, refuses the warm-up request, or takes
    no prompt as long as the last.
    """
    seed = options.seed if options.seed is not None else time.time_ns() % 2**32
    async with open_target(options.url, options.api_key, options.request_timeout_s) as target:
        target.check_length(options.longest_prompt_tokens, options.output_tokens)
        progress("warming up")
        tokens = random_prompt(
            random.Random(f"{seed}/warm-up"), options.max_token_id, options.first_tokens
        )
        await warm_up(target, tokens, options.output_tokens)
        conversations = [
            _Conversation(options, seed, number) for number in range(options.num_conversations)
        ]
        before = await read_counters(target.session)
        turns: list[TurnRow] = []
        steps = BenchProgress(options.num_conversations * options.num_turns, progress)
        while conversations and len(turns) < options.num_turns:
            steps.begin(f"turn {len(turns) + 1} of {options.num_turns}")
            run, row = await _run_turn(target, options, len(turns), conversations, steps)
            turns.append(row)
            on_turn(run)
            conversations = [
                conversation for conversation in conversations if not conversation.has_failed
            ]
        tiers = tier_rows(await _counted(target, before, turns))
    return MultiTurnReport(
        num_conversations=options.num_conversations,
        working_set_tokens=options.working_set_tokens,
        seed=seed,
        turns=turns,
        tiers=tiers,
    )


async def _run_turn(
    target: BenchTarget,
    options: MultiTurnOptions,
    turn: int,
    conversations: Sequence[_Conversation],
    steps: BenchProgress,
) -> tuple[BenchRun, TurnRow]:
    waiting, done = iter(conversations), list[TimedCompletion]()
    start_at = time.perf_counter()
    await asyncio.gather(*(_work(target, waiting, done, steps) for _ in range(options.concurrency)))
    seconds = time.perf_counter() - start_at
    prompt_tokens = options.first_tokens + turn * (options.output_tokens + options.turn_tokens)
    good = [completion for completion in done if completion.error is None]
    ttft_s = [completion.ttft_s for completion in good]
    cached = [
        completion.num_cached_tokens
        for completion in good
        if completion.num_cached_tokens is not None
    ]
    row = summarise(
        prompt_tokens,
        options.concurrency,
        done,
        seconds,
        EngineCounters(),
        goals=options.goals,
        turn=turn + 1,
    )
    run = BenchRun(row=row, done=done, start_at=start_at, model=target.model)
    return run, TurnRow(
        turn=turn + 1,
        prompt_tokens=prompt_tokens,
        num_requests=len(done),
        num_errors=len(done) - len(good),
        seconds=round(seconds, 3),
        ttft_ms_median=quantile_ms(ttft_s, 0.5),
        ttft_ms_p99=quantile_ms(ttft_s, 0.99),
        itl_ms_median=quantile_ms(
            [gap_s for completion in good for gap_s in completion.inter_token_s], 0.5
        ),
        cached_share=round(sum(cached) / (len(cached) * prompt_tokens), 3) if cached else None,
        output_tokens_per_s=round(sum(completion.num_tokens for completion in good) / seconds, 1),
        goodput_per_s=row.goodput_per_s,
        good_share=row.good_share,
        errors=count_errors(done),
    )


async def _work(
    target: BenchTarget,
    waiting: Iterator[_Conversation],
    done: list[TimedCompletion],
    steps: BenchProgress,
) -> None:
    for conversation in waiting:
        done.append(await conversation.say(target))
        steps.one_done()


async def _counted(
    target: BenchTarget, before: EngineCounters, turns: Sequence[TurnRow]
) -> EngineCounters:
    """Return what the engines counted since ``before``, once it includes every answered prompt."""
    num_prompt_tokens = sum(
        row.prompt_tokens * (row.num_requests - row.num_errors) for row in turns
    )

    def is_complete(counters: EngineCounters) -> bool:
        counted = counters.since(before)
        # A decode engine is asked too, for prompts that prefill has computed.
        of_roles = [counted.of_role(role, "prefix_cache_queries") for role in ("prefill", "both")]
        queries = [number for number in of_roles if number is not None]
        return not queries or sum(queries) >= num_prompt_tokens

    return (await counters_when(target.session, is_complete)).since(before)
