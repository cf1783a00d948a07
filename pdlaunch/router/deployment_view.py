"""Collects the state of the deployment for ``/pdlaunch/status``.

The router's own counters are sampled every two seconds, in less than a millisecond. Engines are
asked for their metrics only when somebody requests the status. A metrics page is scanned for the
names in two tables instead of being parsed: 0.1 ms instead of 8.
"""

import asyncio
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from aiohttp import web

from pdlaunch import __version__
from pdlaunch.http.errors import CLIENT_CLOSED_REQUEST, json_response
from pdlaunch.http.limits import Admission
from pdlaunch.protocol.bottleneck import find_bottleneck
from pdlaunch.protocol.control import PairReady
from pdlaunch.protocol.status import (
    DeploymentState,
    DeploymentStatus,
    EngineReading,
    EngineStatus,
    PairStatus,
    Percentiles,
    Pulls,
    Rates,
    route_shares,
)
from pdlaunch.router.engine import Engine, Processes
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import EnginePool, engines_of
from pdlaunch.router.state import RouterState

READ_WAIT_S = 0.5  # a status waits this long for engines; later metrics are in the next status
FRESH_S = 0.9  # minimum time between two reads of the engines' metrics
# Engines read at a time, the least recently read first. Each takes about 1 ms of the router, and
# requests wait for it.
MAX_READS = 64
STEP_S = 2.0  # time between two stored samples of the router's counters or an engine's metrics
WINDOW_S = 10.0  # rates are means over this time
HISTORY_S = 300.0
# ``fastest`` is the step of ``STEP_S`` with the lowest mean time per token, among steps with at
# least LEAST_TOKENS tokens. Of times within the factor SAME_TIME, that with fewer streams wins.
LEAST_TOKENS = 20
SAME_TIME = 1.1

_PREFIX = "pdlaunch_router_"
_NAMES = (  # of the router's metrics, without the prefix
    *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket"),
    *("inter_token_latency_seconds_sum", "inter_token_latency_seconds_count"),
    *("request_success_total", "request_errors_total"),
    *("prompt_tokens_total", "generation_tokens_total"),
)
_COMPUTING = "computing@"  # + engine name: seconds in which it computed prompts

_BY_SOURCE = 'prompt_tokens_cached_by_source_total{{source="{}"}}'
_METRICS = (  # metrics of native engines and of vLLM, by their name here
    ("running", "num_requests_running", "num_requests_running"),
    ("waiting", "num_requests_waiting", "num_requests_waiting"),
    ("kv_usage", "kv_cache_usage_perc", "kv_cache_usage_perc"),
    ("host_blocks", "kv_offload_blocks", ""),
    ("host_usage", "kv_offload_usage_perc", ""),
    ("prompt_tokens", "prefix_cache_queries_total", "prompt_tokens_total"),
    ("device_hits", _BY_SOURCE.format("device"), "prefix_cache_hits_total"),
    ("host_hits", _BY_SOURCE.format("host"), ""),
    ("remote_hits", _BY_SOURCE.format("p2p"), "external_prefix_cache_hits_total"),
    ("pulls", "kv_transfers_total", "nixl_bytes_transferred_count"),
    ("pulled_bytes", "kv_transfer_bytes_total", "nixl_bytes_transferred_sum"),
    ("pull_seconds", "kv_transfer_seconds_total", "nixl_xfer_time_seconds_sum"),
    ("pull_failures", "kv_transfer_failures_total", "nixl_num_failed_transfers_total"),
    ("refused", "kv_verification_failures_total", ""),
)
NAMES: Mapping[str, str] = {
    **{f"pdlaunch_{native}": word for word, native, _ in _METRICS},
    **{f"vllm:{of_vllm}": word for word, _, of_vllm in _METRICS if of_vllm},
}
# Metrics with a label for the prefill engine that the blocks come from.
PULL_NAMES: Mapping[str, str] = {
    "pdlaunch_kv_pull_bytes_sum": "pulled_bytes",
    "pdlaunch_kv_pull_bytes_count": "pulls",
    "pdlaunch_kv_pull_seconds_sum": "pull_seconds",
}
_GAUGES = frozenset(word for word, native, _ in _METRICS if "_total" not in native)
_WITH_SOURCE = frozenset(name.partition("{")[0] for name in NAMES if "{" in name)
_SOURCE = re.compile(r'[{,](source="[^"\\]*")')
_PREFILL = re.compile(r'[{,]prefill="([^"\\]*)"')

# Values of a metrics page, by the values of ``NAMES`` and ``PULL_NAMES``. The latter end with the
# prefill engine: ``pulls@prefill-0``. Values missing on the page are left out.
Counts = Mapping[str, float]


class DeploymentView:
    """Answers ``/pdlaunch/status``. ``run`` must run in the background."""

    def __init__(self, state: RouterState, admission: Admission, served_model_name: str) -> None:
        self._state = state
        self._admission = admission
        self._model = served_model_name
        self._start_at = time.monotonic()
        self._history = RateHistory(state.metrics, time.time, state.pool)
        self._histories: dict[str, EngineHistory] = {}
        self._reading: asyncio.Task[None] | None = None
        self._fresh_until_at = 0.0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(STEP_S)
            self._history.take()

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    def state(self) -> DeploymentState:
        """Return the state for load balancers; requests are accepted only in state ``ok``."""
        pool = self._state.pool
        if self._admission.is_draining:
            return "draining"
        if pool.registry.withheld:
            return pool.registry.withheld
        return "ok" if any(engine.ready for engine in pool.engines) else "unavailable"

    async def status(self) -> DeploymentStatus:
        """Return the status. Reads of engines that take long go on in the background."""
        now_at, is_over = time.monotonic(), self._reading is None or self._reading.done()
        if is_over and now_at >= self._fresh_until_at:
            self._reading = asyncio.ensure_future(self._read(self._state.pool.engines))
            self._fresh_until_at = now_at + FRESH_S
        if self._reading is not None:
            await asyncio.wait([self._reading], timeout=READ_WAIT_S)
        pool, events, sums = self._state.pool, self._state.events, self._history.totals()[1]
        now = self._history.now()
        status = DeploymentStatus(
            at=now.at,
            version=__version__,
            model=self._model,
            state=self.state(),
            uptime_s=round(time.monotonic() - self._start_at, 1),
            in_flight=self._admission.in_flight,
            requests=int(sums["request_success_total"]),
            errors=int(sums["request_errors_total"]),
            engines=[self._engine(engine, pool.clock()) for engine in pool.engines],
            gone=events.gone(),
            pairs=self._pairs(pool.pairs),
            routes=route_shares(self._state.metrics.last_routes),
            rates=now,
            fastest=self._history.fastest,
            routing=pool.policy,
            queued_prompt_tokens=self._state.turns.queue.num_tokens,
            history=list(self._history.points),
            events=list(events.events),
        )
        return msgspec.structs.replace(status, bottleneck=find_bottleneck(status))

    async def answer(self, _: web.Request) -> web.Response:
        return json_response(await self.status())

    async def _read(self, engines: Sequence[Engine]) -> None:
        known, self._histories = self._histories, {}
        for engine in engines:
            history = known.get(engine.name)
            if history is not None and history.processes == engine.processes:
                self._histories[engine.name] = history
            elif engine.ready:  # before, canaries would count as work of clients
                self._histories[engine.name] = EngineHistory(engine.processes)

        async def read(engine: Engine) -> None:
            history = self._histories[engine.name]
            history.asked_at = time.monotonic()
            if (page := await self._state.client.read_metrics(engine)) is not None:
                history.add(time.monotonic(), scan(page))

        begun = [each for each in engines if each.name in self._histories]
        due = sorted(begun, key=lambda each: self._histories[each.name].asked_at)
        await asyncio.gather(*map(read, due[:MAX_READS]), return_exceptions=True)

    def _engine(self, engine: Engine, now_at: float) -> EngineStatus:
        history = self._histories.get(engine.name)
        is_its = history is not None and history.processes == engine.processes
        return EngineStatus(
            name=engine.name,
            role=engine.role,
            kind=engine.capabilities.kind,
            version=engine.capabilities.version,
            url=engine.url,
            host=engine.place,
            state=engine.state,
            is_down=self._state.events.is_down(engine),
            reason=engine.entry.reason,
            health=engine.health.state(now_at),
            left_out=engine.health.why(now_at) if engine.ready else "",
            load=engine.num_works,
            num_devices=len(engine.devices),
            max_running=engine.capabilities.max_num_seqs,
            computing=self._history.computing(engine),
            waiting_prompt_tokens=engine.waiting_tokens(now_at, engine.tokens_per_s),
            prompt_tokens_per_s=engine.tokens_per_s,
            reading=history.reading(time.monotonic()) if history and is_its else None,
        )

    def _pairs(self, proven: Sequence[PairReady]) -> list[PairStatus]:
        # The slowest pair of ranks represents its pair of engines.
        by_speed = sorted(proven, key=lambda pair: -(pair.gigabytes_per_s or 0.0))
        links = {engines_of(pair): pair for pair in by_speed}
        num_peers = Counter(decode for _, decode in links)
        states = self._state.pool.pair_states()
        no_history = EngineHistory(())
        return [
            PairStatus(
                prefill=names[0],
                decode=names[1],
                path=link.path,
                gigabytes_per_s=link.gigabytes_per_s,
                slow=link.slow,
                pulls=self._histories.get(names[1], no_history).pulls(
                    names[0], is_only=num_peers[names[1]] == 1
                ),
                last_failure=self._state.pair_failures.get(names, ""),
                health=states.get(names, "closed"),
            )
            for names, link in sorted(links.items())
        ]


def scan(page: str) -> Counts:
    """Return the metrics in the tables, summed over labels; of usages, the maximum."""
    counts: dict[str, float] = {}
    for line in page.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        word = NAMES.get(name)
        if name in _WITH_SOURCE and (source := _SOURCE.search(line)):
            word = NAMES.get(f"{name}{{{source[1]}}}")
        elif name in PULL_NAMES and (prefill := _PREFILL.search(line)):
            word = f"{PULL_NAMES[name]}@{prefill[1]}"
        if word is None:
            continue
        try:
            value = float(line.rpartition(" ")[2])
        except ValueError:
            continue
        if 0 <= value < float("inf"):
            before = counts.get(word, 0.0)
            counts[word] = max(value, before) if word.endswith("usage") else before + value
    return counts


class EngineHistory:
    """Holds the metrics of one engine over the last ``WINDOW_S``."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._past: deque[tuple[float, Counts]] = deque()
        self.asked_at = 0.0
        self._at = 0.0
        self._now: Counts = {}

    def add(self, now_at: float, counts: Counts) -> None:
        before, self._now, self._at = self._now, counts, now_at
        if any(counts[word] < before.get(word, 0.0) for word in counts.keys() - _GAUGES):
            # A counter has decreased: the engine's ranks were restarted.
            self._past.clear()
        if not self._past or now_at - self._past[-1][0] >= STEP_S:
            self._past.append((now_at, counts))
        # Keep at least two: if the status is read rarely, rates are those since the last read.
        while now_at - self._past[0][0] > WINDOW_S and len(self._past) > 2:
            self._past.popleft()

    def reading(self, now_at: float) -> EngineReading | None:
        if not self._past:
            return None
        num_tokens = self._grown("prompt_tokens")
        tiers = ("device", "host", "remote") if num_tokens > 0 else ()
        cache = {one: min(1.0, self._grown(f"{one}_hits") / num_tokens) for one in tiers}
        total = {word: int(self._now.get(word, 0)) for word, *_ in _METRICS}
        return EngineReading(
            age_s=now_at - self._at,
            running=total["running"],
            waiting=total["waiting"],
            kv_usage=self._now.get("kv_usage", 0.0),
            host_usage=self._now.get("host_usage", 0.0) if total["host_blocks"] else None,
            cache=cache or None,
            pulls=self.pulls(),
            failed_pulls=total["pull_failures"],
            refused_pulls=total["refused"],
        )

    def pulls(self, prefill: str = "", *, is_only: bool = False) -> Pulls:
        """Return the pulls from a prefill engine; from all if it ``is_only``, or none is named."""
        is_told = any("@" in word for word in self._now)  # the page names prefill engines
        behind = f"@{prefill}" if prefill and (is_told or not is_only) else ""
        words = (f"{word}{behind}" for word in ("pull_seconds", "pulled_bytes", "pulls"))
        pulling_s, moved, num_pulls = map(self._grown, words)
        span_s = self._at - self._past[0][0] if self._past else 0.0
        return Pulls(
            mean_s=pulling_s / num_pulls if num_pulls > 0 else None,
            number=int(self._now.get(f"pulls{behind}", 0)),
            num_bytes=int(self._now.get(f"pulled_bytes{behind}", 0)),
            bytes_per_s=moved / span_s if span_s > 0 else 0.0,
            gigabytes_per_s=moved / pulling_s / 1e9 if pulling_s > 0 else None,
        )

    def _grown(self, word: str) -> float:
        before = self._past[0][1] if self._past else {}
        return self._now.get(word, 0.0) - before.get(word, 0.0)


@dataclass(eq=False)
class RateHistory:
    """Holds the rates of the router's counters; ``take`` has to be called every ``STEP_S``."""

    _metrics: RouterMetrics
    _wall_clock: Callable[[], float]  # returns Unix time
    _pool: EnginePool
    fastest: Rates | None = None

    def __post_init__(self) -> None:
        self.points: deque[Rates] = deque(maxlen=int(HISTORY_S / STEP_S))  # oldest first
        self._past = deque([self.totals()], maxlen=int(WINDOW_S / STEP_S))

    def take(self) -> None:
        point, best = self._since(self._past[-1]), self.fastest
        self.points.append(point)
        self._past.append(self.totals())
        token_ms = point.mean_inter_token_ms
        if not token_ms or point.streams * point.span_s * 1e3 < LEAST_TOKENS * token_ms:
            return
        factor = 1 / SAME_TIME if best is not None and point.streams < best.streams else SAME_TIME
        if best is None or token_ms * factor < (best.mean_inter_token_ms or 0.0):
            self.fastest = point

    def computing(self, engine: Engine) -> float:
        (before_at, before), now_at = self._past[0], self._pool.clock()
        span_s, before_s = now_at - before_at, before.get(_COMPUTING + engine.name, 0.0)
        grown_s = engine.computing_since_start_s(now_at) - before_s
        return min(1.0, max(0.0, grown_s / span_s)) if span_s > 0 else 0.0

    def now(self) -> Rates:
        return self._since(self._past[0])

    def totals(self) -> tuple[float, Counts]:
        """Return the time and the counters; buckets have the key ``NAME@0.5``, with the bound."""
        sums = dict.fromkeys(_NAMES, 0.0)
        for sample in self._metrics.samples([_PREFIX + name for name in _NAMES]):
            name = sample.name.removeprefix(_PREFIX)
            if "le" in sample.labels:
                sums[f"{name}@{sample.labels['le']}"] = sample.value
            # A closed connection of a client is not an error of the deployment.
            elif sample.labels.get("status") != str(CLIENT_CLOSED_REQUEST):
                sums[name] += sample.value
        now_at = self._pool.clock()
        for engine in self._pool.engines:
            sums[_COMPUTING + engine.name] = engine.computing_since_start_s(now_at)
        return now_at, sums

    def _since(self, past: tuple[float, Counts]) -> Rates:
        (before_at, before), (now_at, now) = past, self.totals()
        span_s = now_at - before_at
        grown = {word: now[word] - before.get(word, 0.0) for word in now}
        gaps_s = grown["inter_token_latency_seconds_sum"]
        num_gaps = grown["inter_token_latency_seconds_count"]

        def rate(name: str) -> float:
            return grown[name] / span_s if span_s > 0 else 0.0

        def times(name: str) -> Percentiles | None:
            words = (word for word in grown if word.startswith(f"{name}@"))
            return percentiles({float(word.partition("@")[2]): grown[word] for word in words})

        return Rates(
            at=self._wall_clock(),
            span_s=span_s,
            requests_per_s=rate("request_success_total"),
            errors_per_s=rate("request_errors_total"),
            prompt_tokens_per_s=rate("prompt_tokens_total"),
            output_tokens_per_s=rate("generation_tokens_total"),
            first_token_ms=times("time_to_first_token_seconds_bucket"),
            inter_token_ms=times("inter_token_latency_seconds_bucket"),
            mean_inter_token_ms=gaps_s / num_gaps * 1e3 if num_gaps > 0 else None,
            streams=rate("inter_token_latency_seconds_sum"),
        )


def percentiles(upto: Mapping[float, float]) -> Percentiles | None:
    """Estimate percentiles from a histogram: the number of values up to each bound, in seconds."""
    most = max(upto.values(), default=0.0)
    if most <= 0:
        return None

    def time_ms(wanted: float) -> float:
        low, below = 0.0, 0.0
        for bound in sorted(upto):
            # The last bucket has no upper bound, so return its lower bound.
            if bound == float("inf"):
                break
            # Values are assumed to be spread evenly in each bucket.
            if (number := upto[bound]) >= wanted and number > below:
                return (low + (wanted - below) / (number - below) * (bound - low)) * 1e3
            low, below = bound, number
        return low * 1e3

    return Percentiles(p50=time_ms(0.5 * most), p95=time_ms(0.95 * most))
