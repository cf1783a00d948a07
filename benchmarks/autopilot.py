"""Compares ``autopilot`` with fixed splits of three engines, in virtual time.

Routing policy, status and decisions are the router's own code; engines are simulated. ``python -m
benchmarks.autopilot turning`` simulates a load that changes every 300 s, on engines with about the
speed of an 8B model on an H100. ``... random`` simulates random loads, without and with the
autopilot; ``... sweep`` random loads that turn and turn back, by fifteen SLOs. All three print
rows of JSON: requests per second within the SLO or their ratios, and the role changes. As for
``pdlaunch bench serve --slo``, an ITL goal is for 99 % of an answer's times between tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.config.shared_settings import AutopilotMode, RoutingPolicy
from pdlaunch.protocol.bottleneck import find_bottleneck
from pdlaunch.protocol.control import Address, Answered, ChangeEngines, Entry, ListedState, Registry
from pdlaunch.protocol.status import DeploymentStatus, EngineReading, EngineStatus, Pulls
from pdlaunch.router.deployment_view import STEP_S, RateHistory
from pdlaunch.router.engine import Engine
from pdlaunch.router.main import run_autopilot
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.policy import RoutingRequest
from pdlaunch.router.pool import EnginePool


@dataclass(frozen=True)
class Phase:
    """A load with random arrivals."""

    seconds: float
    requests_per_s: float
    prompt_tokens: int
    output_tokens: int


# Virtual time


@dataclass(frozen=True)
class Speeds:
    """A token takes ``token_s``, plus ``stream_s`` for each stream of its engine."""

    prompt_tokens_per_s: float = 20_000.0
    token_s: float = 0.008
    stream_s: float = 0.00015
    hand_over_s: float = 0.012
    start_s: float = 20.0
    drain_s: float = 30.0
    max_running: int = 256


@dataclass
class SimulatedRequest:
    arrived_at: float
    num_prompt_tokens: int
    num_output_tokens: int
    to_compute: float = 0.0
    decode: str = ""
    work: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    begin: Any = None
    begins_at: float = 0.0
    first_at: float = 0.0
    last_at: float = 0.0
    tokens_at: list[float] = field(default_factory=list)  # emptied at the end
    itl_s: float = math.inf  # of the answer, once it has ended
    num_tokens: float = 0.0

    def is_good(self, ttft_s: float, itl_s: float) -> bool:
        """Return True if the request was answered within the SLO."""
        return self.itl_s <= itl_s and self.first_at - self.arrived_at <= ttft_s


@dataclass
class SimulatedEngine:
    name: str
    role: Role
    state: ListedState = "ready"
    prompts: deque[SimulatedRequest] = field(default_factory=deque)
    streams: list[SimulatedRequest] = field(default_factory=list)


class Simulation:
    """Simulates three engines and their router; ``advance`` moves the clock."""

    def __init__(
        self,
        roles: Sequence[Role],
        phases: Sequence[Phase],
        seed: int = 0,
        speeds: Speeds = Speeds(),
        policy: RoutingPolicy = "load",
        tick_s: float = 0.01,
    ) -> None:
        self.now = 0.0
        self._tick_s = tick_s
        self._speeds = speeds
        self._numbers = itertools.count()
        self.engines = [SimulatedEngine(f"{role}-{next(self._numbers)}", role) for role in roles]
        self.pool = EnginePool(self.clock, policy)
        self._version = 0
        self._publish()
        self.metrics = RouterMetrics("simulated")
        self._history = RateHistory(self.metrics, self.clock, self.pool)
        self._taken_at = 0.0
        self._arrivals = iter(self._arrive(phases, random.Random(seed)))
        self._next = next(self._arrivals, None)
        self.ends_at = sum(phase.seconds for phase in phases)
        self.requests: list[SimulatedRequest] = []
        self.changes: list[tuple[float, str, Role]] = []

    def clock(self) -> float:
        return self.now

    def _arrive(
        self, phases: Sequence[Phase], random_: random.Random
    ) -> Iterator[SimulatedRequest]:
        begin_at = 0.0
        for phase in phases:
            at = begin_at + random_.expovariate(phase.requests_per_s)
            while at < begin_at + phase.seconds:
                # As in real traffic, many requests are short and few are long.
                lengths = (phase.prompt_tokens, phase.output_tokens)
                drawn = [max(2, int(random_.gammavariate(2.0, mean / 2.0))) for mean in lengths]
                yield SimulatedRequest(at, *drawn)
                at += random_.expovariate(phase.requests_per_s)
            begin_at += phase.seconds

    def _publish(self) -> None:
        self._version += 1
        entries = [
            Entry(
                name=each.name,
                kind="server",
                engine=each.name,
                incarnation=1,
                role=each.role,
                devices=(f"cuda:{device}",),
                address=Address(http=f"http://{each.name}"),
                state=each.state,
            )
            for device, each in enumerate(self.engines)
        ]
        self.pool.update(Registry(version=self._version, entries=entries))

    def _counts(self, name: str) -> Engine:
        return next(engine for engine in self.pool.engines if engine.name == name)

    def advance(self, seconds: float) -> None:
        until_at = self.now + seconds
        while self.now < until_at and self.now < self.ends_at:
            self.now += self._tick_s
            while self._next is not None and self._next.arrived_at <= self.now:
                self._route(self._next)
                self._next = next(self._arrivals, None)
            for engine in self.engines:
                if engine.state != "starting":
                    self._step(engine)
            if self.now - self._taken_at >= STEP_S:
                self._taken_at = self.now
                self._history.take()

    def _route(self, request: SimulatedRequest) -> None:
        self.requests.append(request)
        num_tokens = request.num_prompt_tokens
        asked = RoutingRequest(num_prompt_tokens=num_tokens, max_tokens=request.num_output_tokens)
        route = self.pool.route(asked)
        assert route.decode is not None
        first = route.prefill or route.decode
        request.decode, request.to_compute = route.decode.name, float(num_tokens)
        request.begin = request.work.enter_context(
            first.working(
                self.clock,
                num_prompt_tokens=num_tokens,
                num_uncached=num_tokens,
                num_streams=0 if route.prefill else 1,
            )
        )
        next(each for each in self.engines if each.name == first.name).prompts.append(request)

    def _step(self, engine: SimulatedEngine) -> None:
        left_s = self._tick_s
        while engine.prompts and left_s > 0:
            request = engine.prompts[0]
            took_s = min(left_s, request.to_compute / self._speeds.prompt_tokens_per_s)
            request.to_compute -= took_s * self._speeds.prompt_tokens_per_s
            left_s -= took_s
            if request.to_compute <= 1e-6:
                engine.prompts.popleft()
                self._computed(engine, request)
        # Streams wait while prompts are computed.
        running = engine.streams[: self._speeds.max_running]
        token_s = self._speeds.token_s + self._speeds.stream_s * len(running)
        for request in running:
            if request.begins_at > self.now:
                continue
            before = request.num_tokens
            request.num_tokens += left_s / token_s
            if new := range(int(before) + 1, int(request.num_tokens) + 1):
                self.metrics.requests.sent(len(new), self.now - request.last_at)
                request.last_at = self.now
                begun_at = self.now - left_s
                request.tokens_at += (begun_at + (each - before) * token_s for each in new)
            if request.num_tokens >= request.num_output_tokens:
                gaps_s = sorted(after - at for at, after in itertools.pairwise(request.tokens_at))
                request.itl_s = gaps_s[math.ceil(0.99 * len(gaps_s)) - 1] if gaps_s else 0.0
                request.tokens_at.clear()
                request.work.close()
                engine.streams.remove(request)

    def _computed(self, engine: SimulatedEngine, request: SimulatedRequest) -> None:
        request.begin()
        request.first_at = request.last_at = self.now
        request.tokens_at, request.num_tokens = [self.now], 1.0
        if engine.name != request.decode:
            request.begins_at = self.now + self._speeds.hand_over_s
            self._decode(request)
        else:
            engine.streams.append(request)

    def _decode(self, request: SimulatedRequest) -> None:
        """Give a stream to its decode engine, or to another engine if that has left."""
        able = [each for each in self.engines if each.role == "decode" and each.state != "starting"]
        chosen = [each for each in able if each.name == request.decode]
        others = [each for each in able if each.state == "ready"]
        to = (chosen or others)[0]
        request.decode = to.name
        request.work.close()
        working = self._counts(to.name).working(
            self.clock, num_prompt_tokens=request.num_prompt_tokens, num_streams=1
        )
        request.work.enter_context(working)()
        to.streams.append(request)

    def status(self) -> DeploymentStatus:
        now = self._history.now()
        seen = DeploymentStatus(
            at=self.now,
            version="",
            model="simulated",
            state="ok",
            uptime_s=self.now,
            in_flight=0,
            requests=0,
            errors=0,
            engines=[self._engine_status(engine) for engine in self.engines],
            gone=(),
            pairs=(),
            routes=(),
            rates=now,
            routing=self.pool.policy,
            fastest=self._history.fastest,
            history=(),
            events=(),
        )
        return msgspec.structs.replace(seen, bottleneck=find_bottleneck(seen))

    def _engine_status(self, engine: SimulatedEngine) -> EngineStatus:
        counts, num_streams = self._counts(engine.name), len(engine.streams)
        num_running = min(num_streams, self._speeds.max_running)
        reading = EngineReading(
            running=num_running,
            waiting=num_streams - num_running,
            kv_usage=0.0,
            host_usage=None,
            cache=None,
            pulls=Pulls(),
            failed_pulls=0,
            refused_pulls=0,
        )
        return EngineStatus(
            name=engine.name,
            role=engine.role,
            kind="simulated",
            version="",
            url="",
            host="",
            state=engine.state,
            is_down=False,
            reason="",
            load=counts.num_works,
            num_devices=1,
            computing=self._history.computing(counts),
            waiting_prompt_tokens=counts.waiting_tokens(self.now, counts.tokens_per_s),
            prompt_tokens_per_s=counts.tokens_per_s,
            reading=reading,
        )

    # Called by ``run_autopilot``

    async def sleep(self, seconds: float) -> None:
        if self.now >= self.ends_at:
            raise asyncio.CancelledError
        self.advance(seconds)

    async def look(self) -> DeploymentStatus:
        return self.status()

    async def ask(self, command: ChangeEngines) -> Answered:
        """Change the role of an engine: drain it, stop it, start it under a new name."""
        assert command.role is not None
        engine = next(each for each in self.engines if each.name == command.engine)
        self.changes.append((round(self.now, 1), engine.name, command.role))
        engine.state = "draining"
        self._publish()
        stop_at = self.now + self._speeds.drain_s
        while (engine.prompts or engine.streams) and self.now < min(stop_at, self.ends_at):
            self.advance(self._tick_s)
        engine.state = "starting"
        for request in engine.streams:
            self._decode(request)
        for request in engine.prompts:
            request.work.close()
            self._route(request)
            self.requests.pop()
        engine.prompts.clear()
        engine.streams.clear()
        engine.name, engine.role = f"{command.role}-{next(self._numbers)}", command.role
        self._publish()
        self.advance(self._speeds.start_s)
        engine.state = "ready"
        self._publish()
        return Answered(question=0)


def simulate(
    roles: Sequence[Role],
    phases: Sequence[Phase],
    mode: AutopilotMode,
    seed: int = 0,
    **fields: Any,
) -> Simulation:
    """Simulate a load to its end."""
    simulation = Simulation(roles, phases, seed, **fields)
    notes: list[str] = []
    if mode == "off":
        simulation.advance(simulation.ends_at)
        return simulation
    work = run_autopilot(
        mode,
        simulation.look,
        simulation.ask,
        notes.append,
        clock=simulation.clock,
        sleep=simulation.sleep,
    )
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(work)
    return simulation


PREFILL_HEAVY = Phase(300.0, 8.0, 3_600, 60)
DECODE_HEAVY = Phase(300.0, 16.0, 400, 480)
TURNING = (PREFILL_HEAVY, DECODE_HEAVY) * 2
ONE_TWO: tuple[Role, ...] = ("prefill", "decode", "decode")
TWO_ONE: tuple[Role, ...] = ("prefill", "prefill", "decode")
TTFT_S, ITL_S = 1.0, 0.03
MODES: tuple[AutopilotMode, ...] = ("off", "on")


def goodput(simulation: Simulation, ttft_s: float = TTFT_S, itl_s: float = ITL_S) -> float:
    """Return the requests per second that were answered within the SLO."""
    num_good = sum(request.is_good(ttft_s, itl_s) for request in simulation.requests)
    return num_good / simulation.ends_at


def turn_in_time(seed: int, policy: RoutingPolicy) -> Simulation:
    """Simulate ``TURNING`` with the better split for each phase, from the instant that it begins.

    As ever, an engine that changes its role has to drain and start.
    """
    played = Simulation(TWO_ONE, TURNING, seed, policy=policy)
    for number, phase in enumerate(TURNING[1:]):
        played.advance(phase.seconds * (number + 1) - played.now)
        role: Role = "prefill" if phase is PREFILL_HEAVY else "decode"
        givers = [each for each in played.engines if each.role != role]
        giver = min(givers, key=lambda each: len(each.streams))
        asyncio.run(played.ask(ChangeEngines(question=0, engine=giver.name, role=role)))
    played.advance(played.ends_at)
    return played


def measure_turning(seed: int, policy: RoutingPolicy) -> Iterator[dict[str, Any]]:
    play = partial(simulate, phases=TURNING, seed=seed, policy=policy)
    arms: dict[str, Callable[[], Simulation]] = {
        "1P2D": lambda: play(ONE_TWO, mode="off"),
        "2P1D": lambda: play(TWO_ONE, mode="off"),
        "autopilot from 1P2D": lambda: play(ONE_TWO, mode="on"),
        "autopilot from 2P1D": lambda: play(TWO_ONE, mode="on"),
        "changed at each turn": lambda: turn_in_time(seed, policy),
    }
    for name, arm in arms.items():
        played = arm()
        yield {
            "arm": name,
            "requests": len(played.requests),
            "goodput_per_s": round(goodput(played), 2),
            "changes": played.changes,
        }


def phase_of(speeds: Speeds, seconds: float, rate: float, prompts: float, tokens: float) -> Phase:
    """Return a phase; ``prompts`` and ``tokens`` are the numbers of engines that they occupy."""
    num_tokens = prompts * speeds.prompt_tokens_per_s / rate, tokens / speeds.stream_s / rate
    return Phase(seconds, rate, *(max(4, int(number)) for number in num_tokens))


def measure_random(seed: int, policy: RoutingPolicy) -> dict[str, Any]:
    """Simulate a random load of up to 2.6 engines, steady or changing, from a random split."""
    drawn = random.Random(seed)
    start_s = drawn.choice([6.0, 20.0])
    speeds = Speeds(prompt_tokens_per_s=2_000.0, token_s=0.02, stream_s=0.002, start_s=start_s)

    def phase(seconds: float) -> Phase:
        prompts = drawn.uniform(0.1, 2.0)
        tokens, rate = drawn.uniform(0.1, min(1.9, 2.6 - prompts)), drawn.uniform(0.8, 4.0)
        return phase_of(speeds, seconds, rate, prompts, tokens)

    seconds = [drawn.choice([40.0, 80.0, 120.0, 240.0]) for _ in range(2)]
    phases = drawn.choice([[phase(300.0)], [phase(each) for each in seconds] * 3])
    roles = drawn.choice([ONE_TWO, TWO_ONE])
    fields: dict[str, Any] = {"speeds": speeds, "policy": policy, "tick_s": 0.02}
    runs = [simulate(roles, phases, mode, seed, **fields) for mode in MODES]
    return {
        "load": [msgspec.to_builtins(each) for each in phases[:2]],
        "start": f"{roles.count('prefill')}P{roles.count('decode')}D",
        "goodput_per_s": [round(goodput(run, ttft_s=3.0, itl_s=0.08), 2) for run in runs],
        "changes": runs[1].changes,
    }


def measure_sweep(seed: int) -> dict[str, Any]:
    """Simulate a load that turns from prompts to tokens and back; compare with fixed splits.

    Leave out SLOs that the better fixed split meets for less than 15 % of the requests.
    """
    drawn = random.Random(seed)
    speeds = Speeds(prompt_tokens_per_s=2_000.0, token_s=0.02, stream_s=0.002, start_s=6.0)
    rate = drawn.uniform(0.8, 3.0)
    shares = [
        (drawn.uniform(1.2, 1.95), drawn.uniform(0.1, 0.6)),
        (drawn.uniform(0.1, 0.7), drawn.uniform(1.2, 1.9)),
    ]
    phases = [phase_of(speeds, 300.0, rate, *share) for share in shares] * 2

    def runs_of(policy: RoutingPolicy, mode: AutopilotMode) -> list[Simulation]:
        fields: dict[str, Any] = {"speeds": speeds, "policy": policy, "tick_s": 0.02}
        return [simulate(roles, phases, mode, seed, **fields) for roles in (ONE_TWO, TWO_ONE)]

    piloted, fixed, pairs = runs_of("load", "on"), runs_of("load", "off"), runs_of("pairs", "off")
    ratios = []
    for slo in itertools.product((1.5, 3.0, 6.0), (0.03, 0.04, 0.05, 0.06, 0.08)):
        best, by_load, by_pairs = (
            max(goodput(run, *slo) for run in runs) for runs in (piloted, fixed, pairs)
        )
        if by_load > 0.15 * rate:
            ratios.append((best / by_load, best / max(by_pairs, 1e-3)))
    return {
        "load": [msgspec.to_builtins(each) for each in phases[:2]],
        "over_fixed": round(max(first for first, _ in ratios), 2) if ratios else None,
        "least_over_pairs": round(min(second for _, second in ratios), 2) if ratios else None,
        "changes": [run.changes for run in piloted],
    }


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["turning", "random", "sweep"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loads", type=int, default=100, help="number of random loads")
    parser.add_argument("--routing", choices=["load", "pairs"], default="load")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.loads)
    if options.what == "turning":
        rows = measure_turning(options.seed, options.routing)
    elif options.what == "sweep":
        rows = map(measure_sweep, seeds)
    else:
        rows = (measure_random(seed, options.routing) for seed in seeds)
    for row in rows:
        print(json.dumps(row), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
