"""Simulated arms with noise and drift, independent of the package's queueing model."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdlaunch.bench.serve import BenchLoad, summarise
from pdlaunch.bench.timed_completion import Goals, TimedCompletion
from pdlaunch.bench.verdict.arms import Arm
from pdlaunch.bench.verdict.measure import Launches, Load, what_limits
from pdlaunch.bench.verdict.queueing import WARM_UP, EngineFigures, Job
from pdlaunch.bench.verdict.search import Probe, Step
from pdlaunch.config.sources import load_config
from pdlaunch.errors import PdlaunchError

PREFILL_S, BASE_S, STREAM_S, HAND_OVER_S, CHUNK = 0.0028, 0.037, 0.0045, 0.01, 64


@dataclass
class Engine:
    """One core: a step computes a chunk of prompts, in order of arrival, and a token per stream."""

    noise: random.Random
    slowness: float = 1.0
    free_at: float = 0.0
    prompts: list[list[int]] = field(default_factory=list)  # request, tokens left
    streams: dict[int, int] = field(default_factory=dict)  # request -> tokens left

    @property
    def is_busy(self) -> bool:
        return bool(self.prompts or self.streams)

    def step(self, outputs: Sequence[int], found: list[list[float]]) -> list[int]:
        """Run one step; return the requests whose prompts it completes."""
        left = CHUNK if self.streams else 512
        seconds = BASE_S + STREAM_S * len(self.streams) if self.streams else 0.0
        finished = []
        while self.prompts and left:
            number, tokens = self.prompts[0]
            used = min(left, tokens)
            left -= used
            seconds += used * PREFILL_S
            self.prompts[0][1] -= used
            if self.prompts[0][1]:
                break
            self.prompts.pop(0)
            finished.append(number)
        self.free_at += seconds * self.slowness * self.noise.uniform(0.93, 1.07)
        for number in list(self.streams):
            found[number].append(self.free_at)
            self.streams[number] -= 1
            if not self.streams[number]:
                del self.streams[number]
        for number in finished:
            found[number].append(self.free_at)
        return finished


def play(arm: Arm, jobs: Sequence[Job], seed: int, slowness: float) -> list[TimedCompletion]:
    """Return what clients of an arm see."""
    noise = random.Random(seed)
    first = [Engine(noise, slowness) for _ in range(arm.num_both or arm.num_prefill)]
    second = [Engine(noise, slowness) for _ in range(arm.num_decode)]
    found: list[list[float]] = [[] for _ in jobs]
    outputs = [job.output_tokens for job in jobs]
    arrivals = [(job.at_s, number, False) for number, job in enumerate(jobs)]
    while arrivals or any(engine.is_busy for engine in (*first, *second)):
        busy = [engine for engine in (*first, *second) if engine.is_busy]
        arrivals.sort(reverse=True)
        if arrivals and all(arrivals[-1][0] <= engine.free_at for engine in busy):
            at_s, number, is_handed_over = arrivals.pop()
            engines = second if is_handed_over else first
            engine = min(
                engines, key=lambda each: (sum(t for _, t in each.prompts), len(each.streams))
            )
            engine.free_at = engine.free_at if engine.is_busy else max(engine.free_at, at_s)
            if is_handed_over:
                engine.streams[number] = outputs[number] - 1
            else:
                engine.prompts.append([number, jobs[number].prompt_tokens])
            continue
        engine = min(busy, key=lambda each: each.free_at)
        for number in engine.step(outputs, found):
            if outputs[number] > 1 and second:
                arrivals.append((engine.free_at + HAND_OVER_S, number, True))
            elif outputs[number] > 1:
                engine.streams[number] = outputs[number] - 1
    return [
        TimedCompletion(
            start_at=job.at_s,
            tokens_at=times,
            num_tokens=len(times),
            num_prompt_tokens=job.prompt_tokens,
        )
        for job, times in zip(jobs, found, strict=True)
    ]


class SimulatedLaunches(Launches):
    """Measures simulated arms; ``drift``: slowdown of the machine with each start."""

    def __init__(
        self,
        load: Load,
        goals: Goals,
        seed: int,
        *,
        drift: float = 0.0,
        misjudged: float = 1.0,
        broken: Sequence[str] = (),
        num_steps: int = 1000,
    ) -> None:
        """``misjudged``: factor on the measured times of single engines. Ctrl-C comes after
        ``num_steps``.
        """
        super().__init__(load, goals, 0.9, load_config(None, {}, {}), on_cpu=True)
        self.policy = "pairs"  # as ``play`` does
        self.start_s = 5.0
        self.num_starts = 0
        self.now_at = 0.0
        self._seed = seed
        self._drift = drift
        self._broken = broken
        self._misjudged = misjudged
        self._num_steps_left = num_steps

    def clock(self) -> float:
        return self.now_at

    @property
    def slowness(self) -> float:
        return 1 + self._drift * self.num_starts

    def use(self, arm: Arm) -> None:
        if not self._num_steps_left:
            raise KeyboardInterrupt
        self._num_steps_left -= 1
        if arm.name in self._broken:
            raise PdlaunchError("a rank died\nof its memory")
        if self._running != arm:
            self._running = arm
            self.num_starts += 1
            self.now_at += self.start_s

    async def figures(self, arm: Arm) -> EngineFigures:
        self.now_at += 8.0
        factor, lengths = self.slowness * self._misjudged, self.load.lengths()
        return EngineFigures(
            prefill=[(each, each * PREFILL_S * factor) for each in lengths],
            steps=[(number, (BASE_S + STREAM_S * number) * factor) for number in (1, 4, 16)],
            chunk_tokens=CHUNK,
            max_batched_tokens=512,
            max_num_seqs=64,
        )

    async def hand_over_s(self, step_s: float) -> float:
        return HAND_OVER_S

    async def probe(self, step: Step, seed: int) -> Probe:
        jobs = self.load.jobs_at(step.rate, seed)
        done = play(step.arm, jobs, self._seed * 1000 + seed, self.slowness)
        seconds = max(each.tokens_at[-1] for each in done)
        self.now_at += seconds
        counted = done[len(done) // WARM_UP :]
        load = BenchLoad(
            input_tokens=round(statistics.mean(job.prompt_tokens for job in jobs)),
            requests=(),
            request_rate=step.rate,
        )
        return Probe(
            arm=step.arm.name,
            visit=step.visit,
            rate=step.rate,
            met=[self.goals.met_by(each) for each in counted],
            seconds=seconds,
            row=summarise(load, counted, seconds, self.goals),
            limit=what_limits(step.arm, counted, self.goals),
        )
