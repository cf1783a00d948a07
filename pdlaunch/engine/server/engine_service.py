"""Holds what the HTTP handlers of one engine share: model, link to rank 0, limits, leases, metrics.

``SleepDesk`` refuses new requests, waits for running ones, then asks rank 0 to fall asleep.

::

    awake ── sleep ──▶ draining ── idle, rank 0 agrees ────▶ asleep ── wake_up: all tags ──▶ awake
                          └── refused, or out of time ──▶ awake

If the caller disconnects, its sleep or wake-up still runs to the end.
"""

import asyncio
import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from aiohttp import web
from multidict import MultiMapping
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.engine.server.choice import Choice
from pdlaunch.engine.server.rank_link import OfNoRequest, RankLink
from pdlaunch.engine.server.served_model import ServedModel
from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.errors import LEAVING_RETRY_AFTER_S, json_response
from pdlaunch.http.kv_feed import KVFeed
from pdlaunch.http.limits import Admission, Deadlines, Grow, engine_bodies
from pdlaunch.observe.counters import COUNTERS, HISTOGRAMS
from pdlaunch.observe.metrics import RequestMetrics, buckets_of
from pdlaunch.protocol.control import SleepState
from pdlaunch.protocol.engine import (
    EngineStats,
    HistogramSeries,
    Sleep,
    SleepReply,
    WakeUp,
    Welcome,
)
from pdlaunch.protocol.ids import HopId, RequestId
from pdlaunch.protocol.kv_events import KVBlocks

SLEEP_TAGS = ("weights", "kv_cache")
# Limit of grammars that rank 0 has yet to compile, one at a time; a large one takes a second
MAX_NEW_GRAMMARS = 64


def _read_query(
    query: MultiMapping[str], known: dict[str, tuple[str, ...]]
) -> dict[str, list[str]]:
    """Return the values of each parameter, which may be repeated or joined by commas. ``known``:
    their allowed values. Raises RequestError for others.
    """
    found: dict[str, list[str]] = {name: [] for name in known}
    for name, text in query.items():
        if name not in known:
            message = f"unknown query parameter {name!r:.50}; use {', '.join(known)}"
            raise RequestError(message, param="query")
        for value in text.split(","):
            if value not in known[name]:
                message = f"{name} must be {' or '.join(known[name])}, not {value!r:.50}"
                raise RequestError(message, param=name)
            found[name].append(value)
    return found


class SleepDesk:
    """Puts the engine to sleep and wakes it up, one call at a time. ``announce`` reports the state
    to the supervisor, whose registry keeps routers away.
    """

    def __init__(
        self, spec: EngineSpec, admission: Admission, link: Callable[[], RankLink]
    ) -> None:
        self._enabled = spec.enable_sleep_mode
        self._timeout_s = spec.limits.request_timeout_s
        self._admission = admission
        self._link = link
        self._turn = asyncio.Lock()
        self._tags: list[str] = []
        self._state = SleepState(state="awake")
        self._tasks: set[asyncio.Task[Any]] = set()
        self.announce: Callable[[SleepState], None] = lambda _: None

    def check_awake(self) -> None:
        if self._state.state != "awake":
            raise OverloadedError(
                "the engine is asleep or falling asleep",
                status=503,
                retry_after_s=LEAVING_RETRY_AFTER_S,
                code="engine_sleeping",
            )

    def status(self, num_bytes: int = 0) -> dict[str, Any]:
        """Return an answer; ``num_bytes``: device memory freed or allocated, over all ranks."""
        tags = self._tags
        return {"is_sleeping": bool(tags), "sleeping_tags": tags, "num_bytes": num_bytes}

    def settle(self, tags: list[str], *, draining: bool = False) -> None:
        self._tags = tags
        state = SleepState(state="draining" if draining else "sleeping" if tags else "awake")
        if state != self._state:
            self._state = state
            self.announce(state)

    async def is_sleeping(self, _: web.Request) -> web.Response:
        return json_response(self.status())

    async def fall_asleep(self, http: web.Request) -> web.Response:
        """Handle ``level=1|2`` (1 keeps the weights in host memory, 2 reads them again later) and
        ``mode=wait|refuse``. Raises RequestError: 400 without sleep mode, 409 if the engine is
        busy.
        """
        found = _read_query(http.query, {"level": ("1", "2"), "mode": ("wait", "refuse")})
        level, waits = int((found["level"] or ["1"])[-1]), "refuse" not in found["mode"]
        return await self._to_the_end(self._fall_asleep(level, waits))

    async def wake_up(self, http: web.Request) -> web.Response:
        """Wake the pools of ``tags=weights&tags=kv_cache``, or all pools without ``tags``. Raises
        RequestError: 400 without sleep mode, 409 if waking fails.
        """
        tags = _read_query(http.query, {"tags": SLEEP_TAGS})["tags"]
        return await self._to_the_end(self._wake_up(list(dict.fromkeys(tags))))

    async def _fall_asleep(self, level: int, waits: bool) -> dict[str, Any]:
        if self._tags:
            return self.status()
        link = self._link()
        if not waits and self._admission.in_flight:
            raise _conflict(
                f"{self._admission.in_flight} requests are in flight; mode=wait waits for them"
            )
        timeout_s = self._timeout_s if waits else 0.0
        try:
            # First the registry keeps routers away; then the requests that are here can end.
            self.settle(self._tags, draining=True)
            if not await self._admission.wait_idle(self._timeout_s):
                raise _conflict(f"requests were still in flight after {self._timeout_s:g} s")
            return self._answer(await link.call(Sleep(level=level, timeout_s=timeout_s)))
        finally:
            # ``receive`` has stored the tags of a reply; without a reply, they have not changed.
            self.settle(self._tags)

    async def _wake_up(self, tags: list[str]) -> dict[str, Any]:
        if not self._tags:
            return self.status()
        return self._answer(await self._link().call(WakeUp(tags=tags)))

    def _answer(self, reply: SleepReply) -> dict[str, Any]:
        if reply.error is not None:
            raise _conflict(reply.error)
        return self.status(reply.num_bytes)

    async def _to_the_end(self, work: Coroutine[Any, Any, dict[str, Any]]) -> web.Response:
        async def in_turn() -> dict[str, Any]:
            async with self._turn:
                return await work

        if not self._enabled:
            work.close()
            raise RequestError(
                "this engine cannot sleep: enable_sleep_mode is off", code="sleep_mode_off"
            )
        # Shielded, so that a caller that disconnects does not leave the engine half asleep.
        task = asyncio.create_task(in_turn())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return json_response(await asyncio.shield(task))


def _conflict(message: str) -> RequestError:
    return RequestError(message, status=409, code="engine_busy")


MAX_REMEMBERED_LEASES = 4096
LEASE_POLL_S = 0.05
# Rank 0 answers between two steps. Routers wait a little longer than this for /metrics.
READ_STATS_TIMEOUT_S = 1.5
# Rank 0 sends statistics every second, between its steps; after this silence it counts as hung
RANK_SILENCE_S = 30.0


class EngineService:
    """Holds what the HTTP handlers of one engine share. For use in the event loop only."""

    def __init__(self, spec: EngineSpec, registry: CollectorRegistry) -> None:
        self.spec = spec
        limits = spec.limits
        self.admission = Admission(limits.max_queued_requests, _shutting_down)
        self.deadlines = Deadlines(limits.request_timeout_s, _shutting_down)
        self.bodies = engine_bodies(limits.max_body_bytes, spec.max_model_len)
        self.metrics = ServerMetrics(
            registry, engine=spec.name, role=spec.role, model_name=spec.served_model_name
        )
        # The requests whose leases were given to callers, by HopId and by LeaseId.
        self.leases: OrderedDict[str, RequestId] = OrderedDict()
        self.sleep = SleepDesk(spec, self.admission, self.live_link)
        self.kv_feed = KVFeed()
        self.loaded: ServedModel | None = None
        self.max_model_len = spec.max_model_len  # less where the KV cache holds less
        self.welcomed = asyncio.Event()
        self._link: RankLink | None = None
        self._new_grammars: Counter[str] = Counter()

    @property
    def model(self) -> ServedModel:
        if self.loaded is None:
            raise _starting()
        if self.loaded.max_model_len > self.max_model_len:
            self.loaded = replace(self.loaded, max_model_len=self.max_model_len, is_short=True)
        return self.loaded

    @property
    def link(self) -> RankLink:
        if self._link is None or not self.welcomed.is_set():
            raise _starting()
        return self._link

    def live_link(self) -> RankLink:
        """Return the link, unless rank 0 has been silent too long. Raises OverloadedError (503)."""
        link = self.link
        if link.silence_s >= RANK_SILENCE_S:
            raise OverloadedError(
                f"rank 0 has been silent for {link.silence_s:.0f} s",
                status=503,
                code="engine_stalled",
            )
        return link

    def check_health(self) -> None:
        self.admission.check_open()
        self.sleep.check_awake()
        if self.loaded is None:
            raise _starting()
        self.live_link()

    def admit(self) -> contextlib.AbstractContextManager[Grow]:
        self.admission.check_open()
        self.sleep.check_awake()
        return self.admission.admit()

    @contextlib.contextmanager
    def admit_grammar(self, grammar: str) -> Iterator[None]:
        """Count a grammar while rank 0 may have to compile it, once for all requests with it."""
        if grammar not in self._new_grammars and len(self._new_grammars) >= MAX_NEW_GRAMMARS:
            raise OverloadedError(
                f"{MAX_NEW_GRAMMARS} grammars of other requests wait to be compiled",
                code="too_many_grammars",
            )
        self._new_grammars[grammar] += 1
        try:
            yield
        finally:
            self._new_grammars[grammar] -= 1
            if not self._new_grammars[grammar]:
                del self._new_grammars[grammar]

    async def use_link(self, link: RankLink | None) -> None:
        """Replace the link; requests of the old one are lost."""
        old, self._link = self._link, link
        # Before the old link ends its requests, because their callers may retry at once.
        self.welcomed.clear()
        if old is not None:
            # Drop all prefixes before the next rank can report its own.
            self.kv_feed.publish(KVBlocks(block_size=self.spec.block_size, is_all=True))
            self.metrics.stats.num_leased_requests = 0  # a drain need not wait for these
            await old.close()

    async def read_stats(self) -> None:
        """Update the rank's totals; they stay unchanged if the rank does not answer in time."""
        with contextlib.suppress(OverloadedError, TimeoutError):
            async with asyncio.timeout(READ_STATS_TIMEOUT_S):
                await self.live_link().read_stats()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests; wait until no request and no lease is left, or time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.admission.drain(timeout_s)
                await self.read_stats()
                while self.metrics.stats.num_leased_requests:
                    await asyncio.sleep(LEASE_POLL_S)
                    await self.read_stats()

    def receive(self, message: OfNoRequest) -> None:
        match message:
            case Welcome(num_blocks=number):
                self.metrics.stats = EngineStats(num_blocks=number, num_free_blocks=number)
                self.max_model_len = min(self.spec.max_model_len, message.max_model_len)
                self.sleep.settle(message.sleeping_tags)
                self.welcomed.set()
            case EngineStats():
                self.metrics.stats = message
            case SleepReply():
                self.sleep.settle(message.sleeping_tags)
            case KVBlocks():
                self.kv_feed.publish(message)

    def remember_lease(self, hop_id: HopId, request_id: RequestId) -> None:
        for key in (hop_id, request_id):
            self.leases[key] = request_id
            self.leases.move_to_end(key)
        while len(self.leases) > MAX_REMEMBERED_LEASES:  # the oldest have expired by then
            self.leases.popitem(last=False)


def _shutting_down() -> OverloadedError:
    return OverloadedError(
        "the engine is shutting down",
        status=503,
        retry_after_s=LEAVING_RETRY_AFTER_S,
        code="shutting_down",
    )


def _starting() -> OverloadedError:
    return OverloadedError("the engine is starting", status=503, code="engine_starting")


# Metrics: what the server sees, and what rank 0 reports

Shown = tuple[str, str, str, Mapping[str, float]]  # name, help, label, and values by label value


def _gauges(stats: EngineStats) -> Iterator[Shown]:
    def gauge(name: str, text: str, value: float) -> Shown:
        return name, text, "", {"": value}

    num_used = stats.num_blocks - stats.num_free_blocks
    waiting = {"capacity": stats.num_waiting, "deferred": stats.num_waiting_for_kv}
    num_host, num_used_host = stats.num_host_blocks, stats.num_used_host_blocks
    # fmt: off
    yield gauge("num_requests_running", "Requests in the batch.", stats.num_running)
    yield gauge("num_requests_waiting", "Requests that wait for a place in the batch or KV blocks.",
                sum(waiting.values()))
    yield ("num_requests_waiting_by_reason",
           "Waiting requests: for a place (capacity), for KV blocks (deferred).", "reason", waiting)
    yield gauge("num_requests_leased", "Finished prefills that wait for a pull.",
                stats.num_leased_requests)
    yield gauge("kv_blocks", "KV blocks of a rank.", stats.num_blocks)
    yield gauge("kv_blocks_free", "KV blocks that can be allocated.", stats.num_free_blocks)
    yield gauge("kv_blocks_leased", "KV blocks under lease.", stats.num_leased_blocks)
    yield gauge("kv_blocks_quarantined", "KV blocks that a READ may still write to.",
                stats.num_quarantined_blocks)
    yield gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.",
                num_used / max(stats.num_blocks, 1))
    yield gauge("kv_offload_blocks", "Room of the host tier in KV blocks.", num_host)
    yield gauge("kv_offload_blocks_used", "KV blocks in the host tier.", num_used_host)
    yield gauge("kv_offload_jobs", "Copies between device and host in flight.",
                stats.num_offload_jobs)
    yield gauge("kv_offload_usage_perc", "Share of the host tier in use, 0 to 1.",
                num_used_host / max(num_host, 1))
    # fmt: on


def _counters(stats: EngineStats) -> Iterator[Shown]:
    values = {name: dict.fromkeys(known.values or ("",), 0.0) for name, known in COUNTERS.items()}
    for counted, number in stats.counts.items():
        name, _, label = counted.partition("/")
        values[name][label] = number
    for name, known in COUNTERS.items():
        yield name, known.text, known.label, values[name]


class ServerMetrics(Collector):
    """Holds all metrics of an engine's server; ``stats`` are the last of rank 0. Totals restart
    from 0 with each rank incarnation, which Prometheus allows.
    """

    def __init__(
        self, registry: CollectorRegistry, *, engine: str, role: str, model_name: str
    ) -> None:
        labels = {"engine": engine, "role": role, "model_name": model_name}
        self.stats, self._engine = EngineStats(), engine
        self._names, self._values = list(labels), list(labels.values())
        self.registry = registry
        self.requests = RequestMetrics(registry, labels)
        registry.register(self)

    def asked(self, num_prompt_tokens: int) -> None:
        self.requests.prompt_tokens.inc(num_prompt_tokens)
        self.requests.prompt_length.observe(num_prompt_tokens)

    def ended(self, choices: Sequence[Choice], otherwise: str) -> None:
        for choice in choices:
            self.requests.finished(choice.finish_reason or otherwise)

    def collect(self) -> Iterator[Metric]:
        for kind, rows in (
            (GaugeMetricFamily, _gauges(self.stats)),
            (CounterMetricFamily, _counters(self.stats)),
        ):
            for name, text, label, values in rows:
                names = [*self._names, *filter(None, [label])]
                family = kind(f"pdlaunch_{name}", text, labels=names)
                for value, number in values.items():
                    family.add_metric([*self._values, *filter(None, [value])], number)
                yield family
        for name, known in HISTOGRAMS.items():
            # Only the histograms of pulls have labels. This engine is the decode side of its pulls.
            names = [*self._names, *known.labels, *(["decode"] if known.labels else [])]
            shown = HistogramMetricFamily(f"pdlaunch_{name}", known.text, labels=names)
            found = [series for series in self.stats.histograms if series.name == name]
            if not found and not known.labels:
                empty = [0] * (len(known.bounds) + 1)
                found = [HistogramSeries(name=name, labels=(), counts=empty)]
            for series in found:
                own = [*self._values, *series.labels, *([self._engine] if known.labels else [])]
                shown.add_metric(own, buckets_of(known.bounds, series.counts), series.sum)
            yield shown
