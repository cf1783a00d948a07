"""Reads what engines say on their metrics pages, for the status: few names, and not too often.

A page is scanned for the names of two tables instead of being parsed: 0.1 ms instead of 8. Nothing
is read while nobody asks; then at most ``MAX_READS`` engines are read in a turn, those first that
were not for the longest time, and none twice in ``FRESH_S``.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec

from pdlaunch.protocol.status import CacheHits, EngineReading, PullTotals
from pdlaunch.router.engine import Engine, Processes
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.event_log import EventLog

FRESH_S = 0.9
MAX_READS = 64
"""Engines a turn. A reading takes the router less than 6 ms. With 1,000 engines a turn comes every
five seconds, so that each is read every 80 s.
"""
AT_ONCE = 16
RATE_S = 10.0
"""The span of rates."""
WINDOW_S = 60.0
"""The span of cache hits and of the speed of pulls."""
STEP_S = 2.0
"""Between two readings of an engine that are kept."""

NAMES: Mapping[str, str] = {
    "pdlaunch_num_requests_running": "running",
    "pdlaunch_num_requests_waiting": "waiting",
    "pdlaunch_num_requests_leased": "leased",
    "pdlaunch_kv_cache_usage_perc": "kv_usage",
    "pdlaunch_kv_offload_blocks": "host_blocks",
    "pdlaunch_kv_offload_usage_perc": "host_usage",
    "pdlaunch_prefix_cache_queries_total": "prompt_tokens",
    "pdlaunch_sampled_tokens_total": "output_tokens",
    'pdlaunch_prompt_tokens_cached_by_source_total{source="device"}': "device_hits",
    'pdlaunch_prompt_tokens_cached_by_source_total{source="host"}': "host_hits",
    'pdlaunch_prompt_tokens_cached_by_source_total{source="p2p"}': "remote_hits",
    "pdlaunch_kv_transfers_total": "pulls",
    "pdlaunch_kv_transfer_bytes_total": "pulled_bytes",
    "pdlaunch_kv_transfer_seconds_total": "pull_seconds",
    "pdlaunch_kv_transfer_failures_total": "pull_failures",
    "pdlaunch_kv_verification_failures_total": "refused",
    "pdlaunch_kv_recomputed_requests_total": "recomputed",
    "pdlaunch_num_preemptions_total": "preemptions",
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "output_tokens",
    "vllm:prefix_cache_hits_total": "device_hits",
    "vllm:external_prefix_cache_hits_total": "remote_hits",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:nixl_bytes_transferred_sum": "pulled_bytes",
    "vllm:nixl_bytes_transferred_count": "pulls",
    "vllm:nixl_xfer_time_seconds_sum": "pull_seconds",
    "vllm:nixl_num_failed_transfers_total": "pull_failures",
}
PULL_NAMES: Mapping[str, str] = {
    "pdlaunch_kv_pull_bytes_sum": "pulled_bytes",
    "pdlaunch_kv_pull_bytes_count": "pulls",
    "pdlaunch_kv_pull_seconds_sum": "pull_seconds",
}
"""Counted for each prefill engine that blocks come from."""
_PREFILL = re.compile(r'[{,]prefill="([^"\\]*)"')
_WITH_SOURCE = frozenset(name.partition("{")[0] for name in NAMES if "{" in name)
_SOURCE = re.compile(r'[{,](source="[^"\\]*")')
_GAUGES = frozenset({"running", "waiting", "leased", "kv_usage", "host_blocks", "host_usage"})

Counts = Mapping[str, float]
"""By the words of ``NAMES``; what a page does not have is missing."""


class Page(NamedTuple):
    """Holds what a metrics page says."""

    counts: Counts
    pulls: Mapping[str, Counts]
    """By prefill engine, with the words of ``PULL_NAMES``."""


def scan(page: str) -> Page:
    """Return the sums over labels of what the tables name; usages are those of the fullest."""
    counts: dict[str, float] = {}
    pulls: dict[str, dict[str, float]] = {}
    for line in page.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        sums, word = counts, NAMES.get(name)
        if name in _WITH_SOURCE and (source := _SOURCE.search(line)):
            word = NAMES.get(f"{name}{{{source[1]}}}")
        if word is None and (word := PULL_NAMES.get(name)) and (prefill := _PREFILL.search(line)):
            sums = pulls.setdefault(prefill[1], {})
        value = _number(line.rpartition(" ")[2]) if word else None
        if word is None or value is None:
            continue
        if word.endswith("usage"):
            sums[word] = max(value, sums.get(word, 0.0))
        else:
            sums[word] = sums.get(word, 0.0) + value
    return Page(counts, pulls)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


class _Past(NamedTuple):
    at: float
    page: Page


class Pulls(NamedTuple):
    """Tells what one engine has pulled from another."""

    number: int = 0
    num_bytes: int = 0
    bytes_per_s: float = 0.0
    gigabytes_per_s: float | None = None


class _Book:
    """Keeps the readings of one engine over the last minute."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._past: deque[_Past] = deque()
        self._latest: _Past | None = None
        self._shown: EngineReading | None = None
        """The reading of the latest page; made once, as many may ask."""
        self._pulls: dict[str, Pulls] = {}
        """The same of each prefill engine."""
        self.asked_at = float("-inf")

    def add(self, now_at: float, page: Page) -> Counts:
        """Keep a reading; return by how much its totals have grown since the one before."""
        counts, before = page.counts, (self._latest or _Past(now_at, page)).page.counts
        grown = {word: counts[word] - before.get(word, 0.0) for word in counts.keys() - _GAUGES}
        if min(grown.values(), default=0.0) < 0:
            # It counts from zero again: its ranks were restarted.
            self._past.clear()
            grown = {}
        self._latest = latest = _Past(now_at, page)
        self._shown, self._pulls = None, {}
        if not self._past or now_at - self._past[-1].at >= STEP_S:
            self._past.append(latest)
        while now_at - self._past[0].at > WINDOW_S and len(self._past) > 1:
            self._past.popleft()
        return grown

    def show(self, now_at: float) -> EngineReading | None:
        if self._latest is None:
            return None
        if self._shown is None:
            self._shown = self._make(*self._latest)
        return msgspec.structs.replace(self._shown, age_s=round(now_at - self._latest.at, 1))

    def _make(self, at: float, page: Page) -> EngineReading:
        now = page.counts
        first, (recent_at, (recent, _)) = self._past[0].page.counts, self._recent(at)

        def grown(word: str) -> float:
            return now.get(word, 0.0) - first.get(word, 0.0)

        def rate(word: str) -> float:
            return _rate(now.get(word, 0.0) - recent.get(word, 0.0), at - recent_at)

        def total(word: str) -> int:
            return int(now.get(word, 0.0))

        prompt, seconds = grown("prompt_tokens"), grown("pull_seconds")
        return EngineReading(
            age_s=0.0,
            running=total("running"),
            waiting=total("waiting"),
            leased_requests=total("leased"),
            kv_usage=now.get("kv_usage", 0.0),
            host_usage=now.get("host_usage", 0.0) if now.get("host_blocks") else None,
            prompt_tokens_per_s=rate("prompt_tokens"),
            output_tokens_per_s=rate("output_tokens"),
            pulled_bytes_per_s=rate("pulled_bytes"),
            pull_gigabytes_per_s=grown("pulled_bytes") / seconds / 1e9 if seconds > 0 else None,
            cache=CacheHits(
                device=min(1.0, grown("device_hits") / prompt),
                host=min(1.0, grown("host_hits") / prompt),
                remote=min(1.0, grown("remote_hits") / prompt),
            )
            if prompt > 0
            else None,
            pulls=PullTotals(
                done=total("pulls"),
                num_bytes=total("pulled_bytes"),
                failed=total("pull_failures"),
                refused=total("refused"),
                recomputed=total("recomputed"),
            ),
            preemptions=total("preemptions"),
        )

    def pulls(self, prefill: str, *, is_only: bool) -> Pulls | None:
        """Return what came from ``prefill``; with ``is_only`` that is all, where an engine does
        not tell its pulls apart.
        """
        if self._latest is None:
            return None
        if prefill not in self._pulls:
            self._pulls[prefill] = self._make_pulls(*self._latest, prefill, is_only=is_only)
        return self._pulls[prefill]

    def _make_pulls(self, at: float, now: Page, prefill: str, *, is_only: bool) -> Pulls:
        recent = self._recent(at)
        first = self._past[0].page
        if not now.pulls and is_only:
            after, before, lately = now.counts, first.counts, recent.page.counts
        else:
            after, before, lately = (
                page.pulls.get(prefill, {}) for page in (now, first, recent.page)
            )
        num_bytes = after.get("pulled_bytes", 0.0)
        seconds = after.get("pull_seconds", 0.0) - before.get("pull_seconds", 0.0)
        grown = num_bytes - before.get("pulled_bytes", 0.0)
        return Pulls(
            number=int(after.get("pulls", 0)),
            num_bytes=int(num_bytes),
            bytes_per_s=_rate(num_bytes - lately.get("pulled_bytes", 0.0), at - recent.at),
            gigabytes_per_s=grown / seconds / 1e9 if seconds > 0 else None,
        )

    def _recent(self, at: float) -> _Past:
        """Return the reading from which rates count: the oldest of the last seconds, else the one
        before the latest.
        """
        before = [past for past in self._past if past is not self._latest] or [self._past[0]]
        return next((past for past in before if at - past.at <= RATE_S), before[-1])


def _rate(number: float, span_s: float) -> float:
    return number / span_s if span_s > 0 else 0.0


class EngineReadings:
    """Keeps the last readings of all engines. ``clock`` counts seconds."""

    def __init__(self, client: EngineClient, events: EventLog, clock: Callable[[], float]) -> None:
        self._client = client
        self._events = events
        self._clock = clock
        self._books: dict[str, _Book] = {}
        self._turn: asyncio.Task[None] | None = None

    def of(self, engine: Engine) -> EngineReading | None:
        """Return the last reading of these very processes."""
        book = self._books.get(engine.name)
        if book is None or book.processes != engine.processes:
            return None
        return book.show(self._clock())

    def pulls(self, prefill: str, decode: str, *, is_only: bool) -> Pulls:
        """Return what ``decode`` has pulled from ``prefill``, its only peer or not."""
        book = self._books.get(decode)
        return (book and book.pulls(prefill, is_only=is_only)) or Pulls()

    async def refresh(self, engines: Collection[Engine], wait_s: float) -> None:
        """Read engines that were not read lately; one that does not answer in ``wait_s`` is read
        on meanwhile.
        """
        if self._turn is None or self._turn.done():
            self._turn = asyncio.ensure_future(self._read(self._due(engines)))
        await asyncio.wait([self._turn], timeout=wait_s)

    async def close(self) -> None:
        """Give up what is being read."""
        if self._turn is not None:
            self._turn.cancel()
            await asyncio.gather(self._turn, return_exceptions=True)

    def _due(self, engines: Collection[Engine]) -> Sequence[Engine]:
        names = {engine.name for engine in engines}
        self._books = {name: book for name, book in self._books.items() if name in names}
        before = self._clock() - FRESH_S
        due = []
        for engine in engines:
            book = self._books.get(engine.name)
            if book is None or book.processes != engine.processes:
                book = self._books[engine.name] = _Book(engine.processes)
            if engine.url and book.asked_at <= before:
                due.append((book.asked_at, engine.name, engine))
        return [engine for _, _, engine in sorted(due, key=lambda item: item[:2])[:MAX_READS]]

    async def _read(self, engines: Sequence[Engine]) -> None:
        at_once = asyncio.Semaphore(AT_ONCE)

        async def read(engine: Engine) -> None:
            async with at_once:
                book = self._books[engine.name]
                book.asked_at = self._clock()
                page = await self._client.read_metrics(engine)
                if page is not None and self._books.get(engine.name) is book:
                    self._note_refusals(engine, book.add(self._clock(), scan(page)))

        await asyncio.gather(*(read(engine) for engine in engines), return_exceptions=True)

    def _note_refusals(self, engine: Engine, grown: Counts) -> None:
        for word, text in (
            ("pull_failures", "pulls have failed"),
            ("refused", "pulls were refused: hashes or checksums differed"),
            ("recomputed", "prompts were computed again after failed pulls"),
        ):
            if number := int(grown.get(word, 0)):
                self._events.add("pull", engine.name, f"{number} {text}", is_bad=True)
