"""Starts arms and measures them: the speed of single engines, and goodput at a request rate."""

import asyncio
import contextlib
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate, pairwise

import aiohttp
import msgspec

from pdlaunch.api import launched, resolve_here
from pdlaunch.bench import serve
from pdlaunch.bench.timed_completion import Goals, TimedCompletion, complete
from pdlaunch.bench.verdict.arms import Arm, config_to_measure
from pdlaunch.bench.verdict.queueing import WARM_UP, EngineFigures, Job
from pdlaunch.bench.verdict.search import Probe, Step
from pdlaunch.config.sources import LoadedConfig
from pdlaunch.errors import PdlaunchError

_MIN_REQUESTS, _MAX_REQUESTS, _MIN_PROBE_S = 12, 400, 10.0
_BATCHES = (4, 16, 64)
_NUM_REPEATS = 3
_NUM_STEPS = 16  # timed steps of each batch
_MAX_OUTPUT = 128
_MAX_STREAM = 512  # most tokens of a stream that runs while a prompt is computed
_MAX_PROMPTS_S = 8.0  # batches whose prompts take longer are not measured
_FULL = "HTTP 429"
_SETTLE_S = 1.0  # time for engines to drop aborted requests, which takes a step


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The user's load, which can be sent at any rate."""

    # Lengths and shared blocks; timestamps give the bursts, if they differ
    requests: Sequence[serve.TraceRequest]
    prefix: list[int] = []  # tokens at the start of every prompt
    token_ids: range = range(serve.FIRST_TOKEN_ID, 30_000)
    seed: int = 0
    probe_s: float = 20.0
    num_left_out: int = 0  # requests of the trace that are too long for the model

    def jobs_at(self, rate: float, seed: int) -> list[Job]:
        """Return send times and lengths of the requests at a rate: the same for every arm."""
        # At low rates few requests, to keep probes short; at high rates enough to build up queues.
        least = min(_MIN_REQUESTS, max(5, round(2 * rate * self.probe_s)))
        most = max(_MAX_REQUESTS, round(rate * _MIN_PROBE_S))
        number = min(most, max(least, round(rate * self.probe_s)))
        laps, chosen = zip(*self._chosen(number, seed), strict=True)
        gaps = [max(0.0, late.timestamp - early.timestamp) for early, late in pairwise(chosen)]
        times = list(accumulate(gaps, initial=0.0))
        if not any(gaps):
            times = serve.arrival_times(rate, 1.0, number, random.Random(f"{self.seed}/{seed}"))
        # A few random arrivals can miss ``rate`` by far, so the times are scaled to it.
        scale = (number - 1) / rate / times[-1]
        seen: set[tuple[int, int]] = set()
        jobs = []
        for at_s, lap, each in zip(times, laps, chosen, strict=True):
            blocks = {(lap, hash_id) for hash_id in each.hash_ids}
            num_cached = serve.HASHED_TOKENS * len(seen & blocks)
            seen |= blocks
            new = max(1, each.input_length - num_cached)
            jobs.append(Job(at_s * scale, new, each.output_length))
        return jobs

    def prompts(self, number: int, seed: int) -> list[list[int]]:
        """Return the prompts of ``jobs_at``. Prompts of different seeds share only the prefix."""
        prompts = []
        for place, (lap, each) in enumerate(self._chosen(number, seed)):
            own_seed, shared_seed = f"{seed}/{place}", f"{self.seed + seed}/{lap}"
            tokens = serve.trace_prompt(each, self.token_ids, own_seed, shared_seed)
            prompts.append(self.prefix + tokens)
        return prompts

    def lengths(self) -> list[int]:
        """Return representative prompt lengths, in uncached tokens."""
        new = sorted(job.prompt_tokens for job in self.jobs_at(_MAX_REQUESTS / self.probe_s, 0))
        return sorted({new[len(new) * tenths // 10] for tenths in (1, 5, 9)})

    def _chosen(self, number: int, seed: int) -> list[tuple[int, serve.TraceRequest]]:
        """Return requests with their lap over the trace. Different laps share no blocks."""
        places = range(seed * number, (seed + 1) * number)
        laps = [divmod(place, len(self.requests)) for place in places]
        return [(lap, self.requests[index]) for lap, index in laps]


class Launches(contextlib.ExitStack):
    """Starts arms, one at a time, and measures them. The methods may raise PdlaunchError."""

    def __init__(
        self, load: Load, goals: Goals, attainment: float, loaded: LoadedConfig, *, on_cpu: bool
    ) -> None:
        super().__init__()
        self.load = load
        self.goals = goals
        self.policy = loaded.config.routing.policy
        self._attainment = attainment
        self._loaded = loaded
        self._on_cpu = on_cpu
        self._running: Arm | None = None
        self._url = ""
        self._key: str | None = None
        self.start_s = 0.0

    def use(self, arm: Arm) -> None:
        """Start the arm, unless it still runs from an earlier step."""
        if self._running == arm:
            return
        self.stop()
        config = self._config(arm)
        key = config.config.api_key
        self._key = None if key is None else key.get_secret_value()
        deployment = self.enter_context(launched(config))
        self._url, self.start_s = deployment.url, deployment.start_s
        self._running = arm
        # Warm up: the first requests compile kernels, connect engines and fill caches.
        num_engines = arm.num_both + arm.num_prefill + arm.num_decode
        asyncio.run(self._prompts_at_once(2 * num_engines, 0, 3))

    def stop(self) -> None:
        """Stop the running arm. Errors are ignored, since they do not concern the next arm."""
        self._running = None
        with contextlib.suppress(PdlaunchError):
            self.close()

    async def figures(self, arm: Arm) -> EngineFigures:
        """Measure the engines of an aggregated arm, all at once, because they may share memory."""
        engines = next(iter(resolve_here(self._config(arm)).roles.values()))
        num_engines, max_seqs = arm.num_both, engines.settings.max_num_seqs
        goals, lengths, prefill = self.goals, self.load.lengths(), []
        for length in lengths:
            ttfts_s: list[float] = []
            for _ in range(_NUM_REPEATS):
                done = await self._prompts_at_once(num_engines, length, 1)
                ttfts_s += [each.ttft_s for each in done]
            prefill.append((length, statistics.median(ttfts_s)))
        full_s = prefill[-1][1]
        done = await self._prompts_at_once(num_engines, lengths[-1], _NUM_STEPS)
        steps = [(1, _common_step_s(done))]
        chunk = await self._chunk_tokens(num_engines, lengths[-1], full_s, steps[0][1])
        chunk = min(chunk, engines.max_num_batched_tokens)
        for num_streams in (number for number in _BATCHES if number <= max_seqs):
            is_slow = steps[-1][1] * 1000 > min(goals.itl_ms or 1e9, goals.tpot_ms or 1e9)
            if is_slow or num_streams * full_s > _MAX_PROMPTS_S:
                break
            # Long enough for all streams to overlap: prompts are computed one chunk in each step.
            output = min(_MAX_OUTPUT, _NUM_STEPS + math.ceil(num_streams * lengths[-1] / chunk))
            done = await self._prompts_at_once(num_streams * num_engines, lengths[-1], output)
            steps.append((num_streams, _common_step_s(done)))
        return EngineFigures(
            prefill=prefill,
            steps=steps,
            chunk_tokens=chunk,
            max_batched_tokens=engines.max_num_batched_tokens,
            max_num_seqs=max_seqs,
        )

    async def _chunk_tokens(
        self, num_engines: int, length: int, prefill_s: float, step_s: float
    ) -> int:
        """Return the most prompt tokens in a step with a stream, estimated from its duration."""
        output = min(_MAX_STREAM, _NUM_STEPS + round(2 * prefill_s / step_s))
        streams = asyncio.create_task(self._prompts_at_once(num_engines, length, output))
        await asyncio.sleep(prefill_s + 3 * step_s)
        await self._prompts_at_once(num_engines, length, 1)
        stalls_s = [max(each.all_gaps_s) for each in await streams]
        share = (statistics.median(stalls_s) - step_s) / prefill_s
        # A stall of almost a whole prefill: the engine does not split prompts of this length.
        return 1 << 20 if share > 0.8 else max(16, round(share * length))

    async def hand_over_s(self, step_s: float) -> float:
        """Return by how much the gap between the first two tokens exceeds a step."""
        gaps_s = []
        for _ in range(_NUM_REPEATS):
            (done,) = await self._prompts_at_once(1, 0, 4)
            if done.route is None or done.route[0] == "pair":
                gaps_s.append(done.all_gaps_s[0])
        return max(0.0, statistics.median(gaps_s) - step_s) if gaps_s else 0.0

    async def probe(self, step: Step, seed: int) -> Probe:
        """Send requests at a rate until all are answered, or too many have missed the goals."""
        goals = self.goals
        jobs = self.load.jobs_at(step.rate, seed)
        prompts = self.load.prompts(len(jobs), seed)
        first = len(jobs) // WARM_UP
        # With twice the allowed misses, this rate certainly fails.
        most_missed = 2 * (1 - self._attainment) * (len(jobs) - first) + 1
        done: dict[int, TimedCompletion] = {}
        num_missed = 0
        is_hopeless = asyncio.Event()
        start_at = time.perf_counter()
        async with self._session() as (session, model, _):

            async def send(number: int) -> None:
                nonlocal num_missed
                at_s = start_at + jobs[number].at_s - time.perf_counter()
                await asyncio.sleep(max(0.0, at_s))
                output = jobs[number].output_tokens
                done[number] = await complete(session, model, prompts[number], output)
                num_missed += number >= first and not goals.met_by(done[number])
                if num_missed > most_missed:
                    is_hopeless.set()

            tasks = [asyncio.create_task(send(number)) for number in range(len(jobs))]
            ends = asyncio.create_task(asyncio.wait(tasks))
            stop = asyncio.create_task(is_hopeless.wait())
            try:
                await asyncio.wait([ends, stop], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (ends, stop, *tasks):
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        seconds = time.perf_counter() - start_at
        counted = [done[number] for number in sorted(done) if number >= first]
        errors = [each.error for each in counted if each.error is not None]
        # HTTP 429 means that the arm is too slow. If all requests have other errors, it is broken.
        if len(errors) == len(counted) and not all(each.startswith(_FULL) for each in errors):
            raise PdlaunchError(f"no request was answered: {errors[0]}")
        await asyncio.sleep(_SETTLE_S)
        mean = round(statistics.mean(map(len, prompts)))
        load = serve.BenchLoad(input_tokens=mean, requests=(), request_rate=step.rate)
        return Probe(
            arm=step.arm.name,
            visit=step.visit,
            rate=step.rate,
            met=[goals.met_by(each) for each in counted],
            seconds=time.perf_counter() - start_at,
            row=serve.summarise(load, counted, seconds, goals),
            limit=what_limits(step.arm, counted, goals),
        )

    async def _prompts_at_once(
        self, number: int, length: int, output_tokens: int
    ) -> list[TimedCompletion]:
        """Send new prompts at the same time; ``length`` 0: the median length of the load. Raises
        PdlaunchError unless all are answered.
        """
        lengths = self.load.lengths()
        length = length or lengths[len(lengths) // 2]
        tokens = self.load.token_ids
        async with self._session() as (session, model, max_model_len):
            # These answers may be longer than those of the load, so max_model_len may limit them.
            limit = max_model_len or 2 * (length + output_tokens)
            output_tokens = min(output_tokens, limit // 2)
            length = min(length, limit - output_tokens)
            prompts = [random.choices(tokens, k=length) for _ in range(number)]
            sent = [complete(session, model, prompt, output_tokens) for prompt in prompts]
            done = await asyncio.gather(*sent)
        if errors := [each.error for each in done if each.error is not None]:
            raise PdlaunchError(f"a request of the load failed: {errors[0]}")
        return done

    def _config(self, arm: Arm) -> LoadedConfig:
        return config_to_measure(arm, self._loaded, on_cpu=self._on_cpu)

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[tuple[aiohttp.ClientSession, str, int | None]]:
        async with serve.client_session(self._url, self._key) as session:
            yield session, *await serve.model_of(session, self._url)


def _common_step_s(done: Sequence[TimedCompletion]) -> float:
    """Return the duration of a step while all streams ran; the mean gap if they never all ran.

    Tokens are counted, because vLLM's server sends several at once on busy cores.
    """
    begin_at = max(each.tokens_at[0] for each in done)
    end_at = min(each.tokens_at[-1] for each in done)
    num_tokens = sum(begin_at < at_s <= end_at for each in done for at_s in each.tokens_at)
    if num_tokens:
        return (end_at - begin_at) * len(done) / num_tokens
    # At least 0.1 ms: tokens in one piece have the same time.
    return max(1e-4, statistics.fmean(gap for each in done for gap in each.all_gaps_s))


def what_limits(arm: Arm, done: Sequence[TimedCompletion], goals: Goals) -> str:
    """Return the most frequent cause of missed goals; empty if all requests met them."""
    causes: Counter[str] = Counter()
    for each in done:
        if goals.met_by(each):
            continue
        if each.error is not None:
            causes["full queues" if each.error.startswith(_FULL) else "errors"] += 1
        elif goals.ttft_ms is not None and each.ttft_s * 1000 > goals.ttft_ms:
            causes["prefill queue"] += 1
        elif arm.num_prefill and each.all_gaps_s and each.all_gaps_s[0] == max(each.all_gaps_s):
            causes["hand-over"] += 1
        else:
            causes["decode steps" if arm.num_prefill else "prefill beside streams"] += 1
    return causes.most_common(1)[0][0] if causes else ""
