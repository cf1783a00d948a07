"""Predicts the goodput of an arm: simulates its steps with the figures of single engines."""

import heapq
import math
import statistics
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import NamedTuple

import msgspec

from pdlaunch.bench.timed_completion import Goals, TimedCompletion
from pdlaunch.bench.verdict.arms import Arm
from pdlaunch.config.shared_settings import ONE_ENGINE_POLICIES, RoutingPolicy
from pdlaunch.router.policy import MARGIN

WARM_UP = 5  # the first 1 / WARM_UP of the requests is not counted: queues are still empty
VISIT_SEEDS = 100  # the seeds of a visit's probes begin at ``VISIT_SEEDS * (visit - 1)``
_NUM_REQUESTS = 200  # with fewer requests, the random order of arrivals would decide


class EngineFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The measured speed of engines of one TP size while all devices work."""

    prefill: list[tuple[int, float]]  # prompt tokens -> seconds, ascending
    steps: list[tuple[int, float]]  # streams in a batch -> seconds of a step, ascending
    chunk_tokens: int  # most prompt tokens in a step with streams
    max_batched_tokens: int  # most prompt tokens in a step without streams
    max_num_seqs: int

    def prefill_s(self, num_tokens: float) -> float:
        return _interpolate([(0, 0.0), *self.prefill], num_tokens)

    def step_s(self, num_streams: int) -> float:
        return _interpolate(self.steps, num_streams) if num_streams else 0.0


class Job(NamedTuple):
    """One request to the simulated engines."""

    at_s: float
    prompt_tokens: int  # uncached tokens
    output_tokens: int


def _interpolate(points: Sequence[tuple[int, float]], x: float) -> float:
    """Interpolate linearly; beyond the points, extrapolate from the nearest two."""
    if len(points) == 1:
        return points[0][1]
    place = min(max(bisect_left([at for at, _ in points], x), 1), len(points) - 1)
    (left, low), (right, high) = points[place - 1], points[place]
    return max(low + (high - low) * (x - left) / (right - left), min(low, high) / 2)


class _Engine:
    """Simulates steps: each computes a token of each stream and a chunk of the waiting prompts."""

    def __init__(self, figures: EngineFigures, tokens_at: list[list[float]]) -> None:
        self._figures, self._tokens_at = figures, tokens_at
        self._waiting: deque[list[int]] = deque()  # job, its remaining prompt and output tokens
        self._num_waiting = 0  # tokens of waiting prompts, plus one for each prompt
        self._streams: list[tuple[int, int, int]] = []  # step of the last token, job, first step
        self._ends: list[float] = []  # the instant at the end of each step
        self._now_at = 0.0

    def load(self) -> int:
        return self._num_waiting + len(self._streams)

    def wait_s(self, at_s: float) -> float:
        """Return how long a new prompt would wait."""
        return max(0.0, self._now_at - at_s) + self._figures.prefill_s(self._num_waiting)

    def add(self, number: int, job: Job) -> None:
        if not self._waiting and not self._streams:
            self._now_at = max(self._now_at, job.at_s)
        self._waiting.append([number, job.prompt_tokens, job.output_tokens])
        self._num_waiting += job.prompt_tokens + 1

    def advance(self, until_s: float) -> None:
        """Run the steps that begin before an instant."""
        while (self._waiting or self._streams) and self._now_at < until_s:
            self._step()

    def _step(self) -> None:
        figures, num_streams = self._figures, len(self._streams)
        budget = figures.chunk_tokens if num_streams else figures.max_batched_tokens
        begun: list[tuple[int, int, int]] = []
        num_tokens = 0
        while self._waiting and num_streams + len(begun) < figures.max_num_seqs:
            number, left, output = self._waiting[0]
            used = min(left, budget - num_tokens)
            num_tokens += used
            self._num_waiting -= used
            if used < left:
                self._waiting[0][1] -= used
                break
            begun.append((number, left, output))
            self._waiting.popleft()
            self._num_waiting -= 1
        # Jobs without prompt tokens come from prefill with a first token: they decode in this step.
        seconds = figures.step_s(num_streams + sum(not left for _, left, _ in begun))
        self._now_at += max(seconds + figures.prefill_s(num_tokens), 1e-6)
        step = len(self._ends)
        self._ends.append(self._now_at)
        for number, _, output in begun:
            heapq.heappush(self._streams, (step + output - 1, number, step))
        while self._streams and self._streams[0][0] <= step:
            last, number, first = heapq.heappop(self._streams)
            self._tokens_at[number] = self._ends[first : last + 1]


def simulate(
    arm: Arm,
    jobs: Sequence[Job],
    figures: EngineFigures,
    hand_over_s: float,
    policy: RoutingPolicy = "pairs",
) -> list[TimedCompletion]:
    """Return the simulated requests as clients would see them. ``jobs`` are sorted by arrival."""
    firsts: list[list[float]] = [[] for _ in jobs]
    later: list[list[float]] = [[] for _ in jobs]
    prefills = [_Engine(figures, firsts) for _ in range(arm.num_prefill)]
    others = [_Engine(figures, later) for _ in range(arm.num_both or arm.num_decode)]
    at_prefill: set[int] = set()
    ready: list[tuple[float, int]] = []  # heap of hand-overs: instant, number of the job
    for number, job in enumerate([*jobs, Job(math.inf, 0, 0)]):
        for engine in prefills:
            engine.advance(job.at_s)
        for done in [each for each in at_prefill if firsts[each]]:
            at_prefill.remove(done)
            if jobs[done].output_tokens > 1:
                heapq.heappush(ready, (firsts[done][0] + hand_over_s, done))
        while ready and ready[0][0] <= job.at_s:
            at_s, done = heapq.heappop(ready)
            for engine in others:
                engine.advance(at_s)
            rest = Job(at_s, 0, jobs[done].output_tokens - 1)
            min(others, key=_Engine.load).add(done, rest)
        for engine in others:
            engine.advance(job.at_s)
        if number == len(jobs):
            break
        local = min(others, key=_Engine.load)
        first = min(prefills, key=methodcaller("wait_s", job.at_s), default=local)
        wait_s, least_s = first.wait_s(job.at_s), MARGIN * figures.prefill_s(job.prompt_tokens)
        # The same rule as in router/policy.py
        is_sooner = wait_s > 0 and local.wait_s(job.at_s) + least_s <= wait_s
        if first is local or (policy in ONE_ENGINE_POLICIES and is_sooner):
            local.add(number, job)
        else:
            first.add(number, job._replace(output_tokens=1))
            at_prefill.add(number)
    return [
        TimedCompletion(start_at=job.at_s, tokens_at=first + rest, num_tokens=job.output_tokens)
        for job, first, rest in zip(jobs, firsts, later, strict=True)
    ]


def predict(
    arm: Arm,
    figures: EngineFigures,
    hand_over_s: float,
    jobs_at: Callable[[float, int], Sequence[Job]],
    goals: Goals,
    attainment: float,
    policy: RoutingPolicy = "pairs",
) -> float:
    """Return the highest rate at which the share ``attainment`` of requests meets the goals.
    ``jobs_at``: returns the requests of a probe for a rate and a seed.
    """

    def is_met(rate: float) -> bool:
        met: list[bool] = []
        # The requests of the first probe in each visit, then of the second ones, and so on
        seeds = (visit * VISIT_SEEDS + number for number in range(VISIT_SEEDS) for visit in (0, 1))
        while len(met) < _NUM_REQUESTS:
            done = simulate(arm, jobs_at(rate, next(seeds)), figures, hand_over_s, policy)
            met += [goals.met_by(each) for each in done[len(done) // WARM_UP :]]
        return sum(met) >= attainment * len(met)

    low, high = 0.01, 0.02
    lengths = (figures.max_batched_tokens, *(length for length, _ in figures.prefill))
    tokens_per_s = max(length / figures.prefill_s(length) for length in lengths)
    prompt_tokens = statistics.mean(job.prompt_tokens for job in jobs_at(1.0, 0))
    # Goals that are met at twice the rate of the engines are met at any rate.
    most = 2 * (arm.num_both or arm.num_prefill) * tokens_per_s / prompt_tokens
    while is_met(high) and high < most:
        low, high = high, high * 2
    for _ in range(9):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_met(middle) else (low, middle)
    return low
