"""Collects what is known of the deployment, for ``/pdlaunch/status``.

The router's own counters are taken every two seconds, which costs it less than a millisecond.
Engines are asked only while somebody looks.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from aiohttp import web

from pdlaunch import __version__
from pdlaunch.http.app import AppRoute
from pdlaunch.http.errors import CLIENT_CLOSED_REQUEST, json_response
from pdlaunch.http.limits import Admission
from pdlaunch.protocol.control import PairReady
from pdlaunch.protocol.status import (
    DeploymentState,
    DeploymentStatus,
    EngineStatus,
    PairStatus,
    Percentiles,
    Rates,
)
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_readings import EngineReadings
from pdlaunch.router.metrics import Pair, RouterMetrics
from pdlaunch.router.pool import engines_of
from pdlaunch.router.state import RouterState

# Seconds for which an answer waits for engines; what comes later is in the next one.
READ_WAIT_S = 0.5
MAX_PAIRS = 1000

STEP_S = 2.0
LENGTH_S = 300.0
NOW_S = 10.0  # the span of ``now``

_FIRST_TOKEN = "pdlaunch_router_time_to_first_token_seconds_bucket"
_INTER_TOKEN = "pdlaunch_router_inter_token_latency_seconds_bucket"
_REQUESTS = "pdlaunch_router_request_success_total"
_ERRORS = "pdlaunch_router_request_errors_total"
_PROMPT_TOKENS = "pdlaunch_router_prompt_tokens_total"
_OUTPUT_TOKENS = "pdlaunch_router_generation_tokens_total"
_NAMES = (_FIRST_TOKEN, _INTER_TOKEN, _REQUESTS, _ERRORS, _PROMPT_TOKENS, _OUTPUT_TOKENS)

Buckets = Mapping[float, float]  # the number that took at most so many seconds


class DeploymentView:
    """Answers what the deployment is doing; ``run`` has to run meanwhile."""

    def __init__(self, state: RouterState, admission: Admission, served_model_name: str) -> None:
        self._state = state
        self._admission = admission
        self._model = served_model_name
        self._start_at = time.monotonic()
        self._history = RateHistory(state.metrics, time.monotonic, time.time)
        self._readings = EngineReadings(state.client, time.monotonic)
        self._proven: Sequence[PairReady] = ()
        self._links: Mapping[Pair, PairReady] = {}

    def routes(self) -> list[AppRoute]:
        return [AppRoute("GET", "/pdlaunch/status", self._answer_status)]

    async def run(self) -> None:
        while True:
            await asyncio.sleep(STEP_S)
            self._history.take()

    async def close(self) -> None:
        await self._readings.close()

    def state(self) -> DeploymentState:
        """Return what load balancers are told: only ``ok`` takes requests."""
        pool = self._state.pool
        if self._admission.is_draining:
            return "draining"
        if not pool.serving:
            return "starting"
        return "ok" if any(engine.ready for engine in pool.engines) else "unavailable"

    def status(self) -> DeploymentStatus:
        """Describe the deployment as it is known now."""
        pool, totals, events = self._state.pool, self._history.totals(), self._state.events
        return DeploymentStatus(
            at=totals.at,
            version=__version__,
            model=self._model,
            state=self.state(),
            uptime_s=round(time.monotonic() - self._start_at, 1),
            in_flight=self._admission.in_flight,
            requests=int(totals.sums[_REQUESTS]),
            errors=int(totals.sums[_ERRORS]),
            engines=[self._engine(engine, pool.clock()) for engine in pool.engines],
            gone=events.gone(),
            pairs=self._pairs(pool.pairs),
            num_pairs=len(self._links),
            doubts=list(self._state.doubts.values()),
            rates=self._history.now(totals),
            history=list(self._history.points),
            events=events.events,
        )

    def _engine(self, engine: Engine, now_at: float) -> EngineStatus:
        return EngineStatus(
            name=engine.name,
            role=engine.role,
            kind=engine.capabilities.kind,
            version=engine.capabilities.version,
            url=engine.url,
            host=engine.place,
            state=engine.state,
            is_down=self._state.events.is_down(engine),
            reason=engine.reason,
            health=engine.health.state(now_at),
            left_out=engine.health.why(now_at) if engine.ready else "",
            streams=engine.num_streams,
            load=engine.num_works,
            prompt_tokens=engine.num_prompt_tokens,
            reading=self._readings.of(engine),
        )

    def _pairs(self, proven: Sequence[PairReady]) -> list[PairStatus]:
        """Return the pairs of engines that moved most bytes lately, ``MAX_PAIRS`` at most."""
        if proven is not self._proven:
            by_speed = sorted(proven, key=lambda pair: -(pair.gigabytes_per_s or 0.0))
            # The slowest pair of ranks stands for two engines.
            self._proven, self._links = proven, {engines_of(pair): pair for pair in by_speed}
        num_peers = Counter(decode for _, decode in self._links)
        pulls = {
            names: self._readings.pulls(*names, is_only=num_peers[names[1]] == 1)
            for names in self._links
        }
        states = self._state.pool.pair_states()
        busiest = heapq.nsmallest(
            MAX_PAIRS, pulls, key=lambda names: (-pulls[names].bytes_per_s, names)
        )
        return [
            PairStatus(
                prefill=names[0],
                decode=names[1],
                path=self._links[names].path,
                gigabytes_per_s=self._links[names].gigabytes_per_s,
                other_paths=self._links[names].other_paths,
                pulls=pulls[names].number,
                num_bytes=pulls[names].num_bytes,
                bytes_per_s=pulls[names].bytes_per_s,
                pull_gigabytes_per_s=pulls[names].gigabytes_per_s,
                last_failure=self._state.pair_failures.get(names, ""),
                health=states.get(names, "closed"),
            )
            for names in busiest
        ]

    async def _answer_status(self, _: web.Request) -> web.Response:
        await self._readings.refresh(self._state.pool.engines, READ_WAIT_S)
        return json_response(self.status())


class Totals(NamedTuple):
    """Holds the router's counters at an instant of both clocks."""

    at: float
    now_at: float
    sums: Mapping[str, float]
    buckets: Mapping[str, Buckets]


class RateHistory:
    """Takes the counters every ``STEP_S``; both clocks count seconds, ``wall_clock`` Unix time.

    ``points``: the rates of each step, oldest first.
    """

    def __init__(
        self,
        metrics: RouterMetrics,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self.points: deque[Rates] = deque(maxlen=int(LENGTH_S / STEP_S))
        self._past: deque[Totals] = deque([self.totals()], maxlen=int(NOW_S / STEP_S))

    def take(self) -> None:
        totals = self.totals()
        self.points.append(_between(self._past[-1], totals))
        self._past.append(totals)

    def now(self, totals: Totals) -> Rates:
        return _between(self._past[0], totals)

    def totals(self) -> Totals:
        sums = dict.fromkeys(_NAMES, 0.0)
        buckets: dict[str, dict[float, float]] = {_FIRST_TOKEN: {}, _INTER_TOKEN: {}}
        for sample in self._metrics.samples(_NAMES):
            if sample.name in buckets:
                buckets[sample.name][float(sample.labels["le"])] = sample.value
            # A client that has left is no error of the deployment.
            elif sample.labels.get("status") != str(CLIENT_CLOSED_REQUEST):
                sums[sample.name] += sample.value
        return Totals(self._wall_clock(), self._clock(), sums, buckets)


def _between(before: Totals, after: Totals) -> Rates:
    span_s = after.now_at - before.now_at

    def rate(name: str) -> float:
        return (after.sums[name] - before.sums[name]) / span_s if span_s > 0 else 0.0

    return Rates(
        at=after.at,
        span_s=span_s,
        requests_per_s=rate(_REQUESTS),
        errors_per_s=rate(_ERRORS),
        prompt_tokens_per_s=rate(_PROMPT_TOKENS),
        output_tokens_per_s=rate(_OUTPUT_TOKENS),
        first_token_ms=percentiles(before.buckets[_FIRST_TOKEN], after.buckets[_FIRST_TOKEN]),
        inter_token_ms=percentiles(before.buckets[_INTER_TOKEN], after.buckets[_INTER_TOKEN]),
    )


def percentiles(before: Buckets, after: Buckets) -> Percentiles | None:
    """Estimate from what came into each bucket, as if it lay evenly in it; None without any."""
    upto = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    most = max(upto.values(), default=0.0)
    if most <= 0:
        return None

    def time_ms(wanted: float) -> float:
        low, below = 0.0, 0.0
        for bound, number in upto.items():
            # The last bucket has no end: its beginning is the best that is known.
            if bound == float("inf"):
                break
            if number >= wanted and number > below:
                return (low + (wanted - below) / (number - below) * (bound - low)) * 1e3
            low, below = bound, number
        return low * 1e3

    return Percentiles(p50=time_ms(0.5 * most), p95=time_ms(0.95 * most))
