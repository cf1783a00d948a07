"""Drives a running deployment through its public API and measures what a client sees (``pdlaunch
bench serve``).

Prompts are random token ids, different in every run, so that no prefix cache helps; ``ignore_eos``
fixes the output length.

``--multi-turn`` holds chats whose every turn sends all that was said
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
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from pdlaunch.bench.serve.loads import BenchLoad, BenchOptions, Planned, plan_loads, random_prompt
from pdlaunch.bench.serve.rows import BenchRow, BenchRun, TierRow, summarise, tier_rows
from pdlaunch.bench.serve.target import BenchTarget, Counters, open_target, total
from pdlaunch.bench.serve.timed_completion import Goals, TimedCompletion, complete
from pdlaunch.errors import PdlaunchError

ProgressText = Callable[[str], None]


class BenchProgress:
    """Counts requests; says after each how many there are and how long the rest will take."""

    def __init__(
        self, total: int, show: ProgressText, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total
        self._show = show
        self._clock = clock
        self._start_at = clock()
        self._num_done = 0
        self._label = ""

    def begin(self, label: str) -> None:
        """Name what is measured from now on."""
        if not self._num_done:
            self._start_at = self._clock()
        self._label = label
        self._show(label)

    def one_done(self) -> None:
        """Count a request that has ended, well or not."""
        self._num_done += 1
        took_s = self._clock() - self._start_at
        left_s = took_s / self._num_done * (self._total - self._num_done)
        done = f"{self._num_done} of {self._total} requests"
        self._show(f"{self._label}; {done}, about {left_s:.0f} s left")


async def bench_serve(options: BenchOptions, progress: ProgressText) -> AsyncIterator[BenchRun]:
    """Measure every length at every concurrency, or rate, in turn, or a trace, after one warm-up
    request a length.

    Raises PdlaunchError when the deployment cannot be used, or refuses a warm-up request.
    """
    async with open_target(options.url, options.api_key, options.request_timeout_s) as target:
        rng = random.Random(options.seed if options.seed is not None else time.time_ns())
        loads = await plan_loads(options, target, rng)
        for input_tokens in dict.fromkeys(load.input_tokens for load in loads):
            progress(f"warming up with a prompt of {input_tokens} tokens")
            prompt = random_prompt(rng, options.max_token_id, input_tokens)
            await warm_up(target, prompt, 2 if options.trace else options.output_tokens)
        steps = BenchProgress(sum(len(load.requests) for load in loads), progress)
        for load in loads:
            steps.begin(load.label)
            yield await _run(target, options, load, steps)


async def warm_up(target: BenchTarget, prompt: Sequence[int], output_tokens: int) -> None:
    """Send one request. Raises PdlaunchError with what the deployment has against it."""
    error = (await complete(target.session, target.model, prompt, output_tokens)).error
    if error is not None:
        raise PdlaunchError(
            f"the deployment does not take a request of {len(prompt)} prompt tokens: {error}"
        )


async def _run(
    target: BenchTarget, options: BenchOptions, load: BenchLoad, steps: BenchProgress
) -> BenchRun:
    done: list[TimedCompletion] = []

    async def send(planned: Planned) -> None:
        make_prompt, output_tokens = planned
        done.append(await complete(target.session, target.model, make_prompt(), output_tokens))
        steps.one_done()

    async def work() -> None:
        for planned in waiting:
            await send(planned)

    before, waiting = await target.counters(), iter(load.requests)
    start_at = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        if load.concurrency is not None:
            # Each that ends makes room for the next.
            for _ in range(load.concurrency):
                group.create_task(work())
        else:
            for at_s, planned in zip(load.times_s, load.requests, strict=True):
                await asyncio.sleep(max(0.0, start_at + at_s - time.perf_counter()))
                group.create_task(send(planned))
    seconds = time.perf_counter() - start_at
    num_pulls = sum(each.error is None and each.num_tokens > 1 for each in done)

    def is_complete(counted: Counters) -> bool:
        pulls = total(counted, "kv_transfers")
        return pulls is None or pulls >= num_pulls

    row = summarise(
        load.input_tokens,
        load.concurrency,
        done,
        seconds,
        await target.counted_since(before, is_complete),
        bare_gb_per_s=options.bare_gb_per_s.get(load.input_tokens),
        step_ms=options.step_ms.get(load.concurrency or 0),
        goals=options.goals,
        request_rate=load.request_rate,
        burstiness=None if load.request_rate is None else options.burstiness,
        num_left_out=load.num_left_out,
    )
    return BenchRun(row=row, done=done, model=target.model)


class MultiTurnOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Sets what one multi-turn benchmark sends to a deployment."""

    url: str = ""
    api_key: str | None = None
    num_conversations: int = 16
    num_turns: int = 4
    first_tokens: int = 128  # length of the first message
    turn_tokens: int = 32  # length of every further message
    output_tokens: int = 32
    concurrency: int = 4
    max_token_id: int = 30_000
    seed: int | None = None
    goals: Goals = Goals()
    request_timeout_s: float = 600.0

    def prompt_tokens(self, turn: int) -> int:
        """Return the length of the prompts of a turn, counted from 0."""
        return self.first_tokens + turn * (self.output_tokens + self.turn_tokens)

    @property
    def working_set_tokens(self) -> int:
        """Return the length of all conversations when they end."""
        longest = self.prompt_tokens(self.num_turns - 1) + self.output_tokens
        return self.num_conversations * longest


class MultiTurnReport(msgspec.Struct, frozen=True, kw_only=True):
    """Holds all turns, and what the engines' caches say of them together."""

    num_conversations: int
    working_set_tokens: int
    seed: int
    turns: list[BenchRow]
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
        found = await complete(target.session, target.model, self.history, options.output_tokens)
        if found.error is None and len(found.token_ids) != options.output_tokens:
            found.error = (
                "the answer does not tell its token ids (return_token_ids), so that nobody can go "
                "on from it"
            )
        self.has_failed = found.error is not None
        self.history += found.token_ids
        return found


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
        target.check_length(options.prompt_tokens(options.num_turns - 1), options.output_tokens)
        progress("warming up")
        source = random.Random(f"{seed}/warm-up")
        first = random_prompt(source, options.max_token_id, options.first_tokens)
        await warm_up(target, first, options.output_tokens)
        numbers = range(options.num_conversations)
        conversations = [_Conversation(options, seed, number) for number in numbers]
        before = await target.counters()
        turns: list[BenchRow] = []
        steps = BenchProgress(options.num_conversations * options.num_turns, progress)
        while conversations and len(turns) < options.num_turns:
            steps.begin(f"turn {len(turns) + 1} of {options.num_turns}")
            run = await _run_turn(target, options, len(turns), conversations, steps)
            turns.append(run.row)
            on_turn(run)
            conversations = [each for each in conversations if not each.has_failed]
        num_prompt_tokens = sum(row.total_prompt_tokens for row in turns)

        def is_complete(counted: Counters) -> bool:
            # A decode engine is asked too, for prompts that prefill has computed.
            keys = [(role, "prefix_cache_queries") for role in ("prefill", "both")]
            queries = [counted[key] for key in keys if key in counted]
            return not queries or sum(queries) >= num_prompt_tokens

        counted = await target.counted_since(before, is_complete)
    return MultiTurnReport(
        num_conversations=options.num_conversations,
        working_set_tokens=options.working_set_tokens,
        seed=seed,
        turns=turns,
        tiers=tier_rows(counted),
    )


async def _run_turn(
    target: BenchTarget,
    options: MultiTurnOptions,
    turn: int,
    conversations: Sequence[_Conversation],
    steps: BenchProgress,
) -> BenchRun:
    waiting, done = iter(conversations), list[TimedCompletion]()

    async def work() -> None:
        for conversation in waiting:
            done.append(await conversation.say(target))
            steps.one_done()

    start_at = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(options.concurrency)))
    seconds = time.perf_counter() - start_at
    row = summarise(
        options.prompt_tokens(turn),
        options.concurrency,
        done,
        seconds,
        {},
        goals=options.goals,
        turn=turn + 1,
    )
    return BenchRun(row=row, done=done, model=target.model)
