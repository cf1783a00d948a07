"""Counts what the router does, and adds every engine's metrics to its own page."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from pdlaunch.observe.histograms import INTER_TOKEN_BUCKETS_S
from pdlaunch.observe.metrics import RequestMetrics, render_metrics
from pdlaunch.protocol.control import ListedState, Registry
from pdlaunch.protocol.transfer import join_paths
from pdlaunch.router.continuation import LOST_REASONS
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.health import HealthState
from pdlaunch.router.policy import Hop
from pdlaunch.router.pool import EnginePool, engines_of

logger = logging.getLogger(__name__)

Pair = tuple[str, str]  # names of a prefill and a decode engine
_PREFIX = "pdlaunch_router_"
_COUNTERS = {  # labels and help by name
    "engine_failures": ("engine hop", "Requests that an engine failed."),
    "retries": ("hop", "Requests sent again, to another engine or to one that is back."),
    "fallbacks": ("", "Requests that one engine did alone, though two were wanted."),
    "migrations": ("", "Answers continued by another engine from the tokens so far."),
    "releases": ("", "Leases ended early because nobody will pull them."),
    "canaries": ("outcome", "Canaries that a router alone has sent through pairs of engines."),
    "silent_recomputes": (
        "prefill decode",
        "Prompts that decode computed though it was handed their KV blocks.",
    ),
    "lost_streams": ("reason", "Streams ended with an error: no other engine can go on with them."),
    "routes": ("kind", "Prompts by the route: a pair of engines, or one engine of a role alone."),
}
_THERE_WITH_0: Mapping[str, Collection[str]] = {
    "retries": get_args(Hop),
    "canaries": ("proven", "failed"),
    "lost_streams": LOST_REASONS,
}
_PAIR_SPEED = "pdlaunch_pair_bytes_per_second"
_ENDS = "pdlaunch_process_ends"  # counted by the supervisor; begins again with each launch
# Shown as they are at a scrape: labels and help by name.
_SHOWN = {
    f"{_PREFIX}engines_ready": ("", "Engines that can be given work."),
    f"{_PREFIX}engines": ("state", "Engines by state; failed ones are left alone for a while."),
    f"{_PREFIX}engine_info": ("engine role host", "Always 1; where an engine runs, in labels."),
    f"{_PREFIX}requests_in_flight": ("", "Prompts that are being answered."),
    f"{_PREFIX}engine_health": (
        "engine state",
        "1 for the state of each engine's breaker: closed, open (it has failed requests and gets "
        "none), half_open (one is tried).",
    ),
    f"{_PREFIX}pair_health": (
        "prefill decode state",
        "1 for the state of the breaker of each pair of which a pull has failed lately.",
    ),
    _PAIR_SPEED: (
        "prefill decode holder puller path",
        "Speed that the handshake has measured between two ranks, over the path in use.",
    ),
    _ENDS: (
        "process reason",
        "Processes that ended while the launch served: they died, or hung and were killed.",
    ),
}


class RouterMetrics:
    """Counts what clients see (``requests``) and what the router did with the engines."""

    def __init__(self, served_model_name: str) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = RequestMetrics(registry, {"model_name": served_model_name}, prefix=_PREFIX)
        self._counters = {
            name: Counter(f"{_PREFIX}{name}", text, labels.split(), registry=registry)
            for name, (labels, text) in _COUNTERS.items()
        }
        for name, values in _THERE_WITH_0.items():
            for value in values:
                self._counters[name].labels(value)
        self._second_token = Histogram(
            "pdlaunch_pair_second_token_seconds",
            "First to second token that a client was sent, where a pair of engines did the prompt.",
            ("prefill", "decode", "path"),
            registry=registry,
            buckets=INTER_TOKEN_BUCKETS_S,
        )
        self._paths: dict[Pair, str] = {}
        self._shown = _Shown()
        registry.register(self._shown)

    def count(self, name: str, *labels: str) -> None:
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc()

    def second_token(self, prefill: str, decode: str, seconds: float) -> None:
        path = self._paths.get((prefill, decode), "unknown")
        self._second_token.labels(prefill, decode, path).observe(seconds)

    def show_registry(self, registry: Registry) -> None:
        """Show how often processes have ended, and the speed of the pairs that are proven now."""
        self._shown.values[_ENDS] = {
            (process, reason): count
            for process, counts in registry.ends.items()
            for reason, count in counts.items()
        }
        paths: dict[Pair, list[str]] = {}
        speeds: dict[tuple[str, ...], float] = {}
        for pair in registry.pairs:
            names = engines_of(pair)
            paths.setdefault(names, []).append(pair.path)
            self._counters["silent_recomputes"].labels(*names)
            if pair.gigabytes_per_s is not None:
                speeds[*names, pair.peer, pair.local, pair.path] = pair.gigabytes_per_s * 1e9
        self._paths = {names: join_paths(found) for names, found in paths.items()}
        self._shown.values[_PAIR_SPEED] = speeds

    def show(self, pool: EnginePool, in_flight: int) -> None:
        engines, now_at = pool.engines, pool.clock()
        states = [engine.state for engine in engines]
        for engine in engines:
            for hop in get_args(Hop):
                self._counters["engine_failures"].labels(engine.name, hop)
        places = {(engine.name, engine.role or "", engine.place): 1 for engine in engines}
        health = {(engine.name,): engine.health.state(now_at) for engine in engines}
        counts = {(each,): states.count(each) for each in get_args(ListedState)}
        shown: dict[str, Mapping[Any, float]] = {
            "engines_ready": {(): states.count("ready")},
            "engines": counts,
            "engine_info": places,
            "requests_in_flight": {(): in_flight},
            "engine_health": _one_of_states(health),
            "pair_health": _one_of_states(pool.pair_states()),
        }
        self._shown.values.update({f"{_PREFIX}{name}": values for name, values in shown.items()})

    def samples(self, names: Collection[str]) -> Iterator[Sample]:
        for metric in self._registry.restricted_registry(list(names)).collect():
            yield from metric.samples

    def text(self) -> bytes:
        return render_metrics(self._registry)


def _one_of_states(states: Mapping[Any, HealthState]) -> dict[tuple[str, ...], float]:
    kinds = get_args(HealthState)
    return {(*names, kind): kind == state for names, state in states.items() for kind in kinds}


class _Shown(Collector):
    """Shows values that others know, by labels."""

    def __init__(self) -> None:
        self.values: dict[str, Mapping[Any, float]] = {}

    def describe(self) -> Iterator[Metric]:
        """Yield the names, under which a registry finds them."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        for name, (labels, text) in _SHOWN.items():
            kind = CounterMetricFamily if name == _ENDS else GaugeMetricFamily
            family = kind(name, text, labels=labels.split())
            for values, number in self.values.get(name, {}).items():
                family.add_metric(list(values), float(number))
            yield family


async def scrape(own_page: bytes, client: EngineClient, engines: Sequence[Engine]) -> bytes:
    """Return ``own_page`` merged with the pages of all engines.

    An engine that does not answer in time is missing.
    """
    families: Families = {}
    add_page(families, own_page.decode())
    pages = await asyncio.gather(*(client.read_metrics(engine) for engine in engines))
    for engine, page in zip(engines, pages, strict=True):
        try:
            add_page(families, page or "", engine=engine.name)
        except ValueError as error:
            logger.warning("%s: its metrics cannot be read: %s", engine.name, error)
        # Reading a page takes a millisecond or two, in which no answer is streamed.
        await asyncio.sleep(0)
    return render_families(families).encode()


# Possessive quantifiers (``*+``) never go back: half of the time, and none is lost to a page that
# is made to be slow.
_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*+"
_VALUE = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_LABEL = rf"[a-zA-Z_][a-zA-Z0-9_]*+={_VALUE}"
_SAMPLE = re.compile(
    rf"({_NAME})(?:\{{((?:{_LABEL},?)*+)\}})?[ \t]++(\S++(?:[ \t]++-?\d++)?)[ \t]*+"
)
_HEADER = re.compile(rf"# (HELP|TYPE) ({_NAME})(?: (.*))?")
# Endings of the samples of one family.
_SUFFIXES = ("", "_total", "_bucket", "_sum", "_count", "_info")
_ENGINE = re.compile(rf"(^|,)engine={_VALUE}")
# Type, help and samples by name.
Families = dict[str, tuple[str, str, list[str]]]


def add_page(families: Families, page: str, *, engine: str | None = None) -> None:
    """Add a page in Prometheus's text format, its samples labelled with ``engine``.

    Without an engine of its own no sample can be mistaken for another page's. Series that tell when
    others were created are left out. Raises ValueError for a malformed page, of which nothing is
    added. prometheus_client's parser takes 20 times as long.
    """
    for name, (kind, text, samples) in _read(page, engine).items():
        known = families.setdefault(name, (kind, text, []))
        # A family has one type on a page; samples of another type are left out.
        if known[0] == kind:
            known[2].extend(samples)


def render_families(families: Families) -> str:
    """Return all families as one page."""
    lines = []
    for name, (kind, text, samples) in families.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples]
    return "\n".join(lines) + "\n"


def _read(page: str, engine: str | None) -> Families:
    families: Families = {}
    texts: dict[str, str] = {}
    current, escaped = "", (engine or "").replace("\\", r"\\").replace('"', r"\"")
    label = "" if engine is None else f'engine="{escaped}"'
    for line in page.splitlines():
        if line.startswith("#"):
            if header := _HEADER.fullmatch(line):
                word, current, rest = header.group(1), header.group(2), header.group(3) or ""
                if word == "HELP":
                    texts[current] = rest
                elif not current.endswith("_created"):
                    families.setdefault(current, (rest, texts.get(current, ""), []))
            continue
        sample = _SAMPLE.fullmatch(line)
        if sample is None:
            if not line.strip():
                continue
            raise ValueError(f"not a sample: {line!r:.100}")
        name, labels, value = sample.groups("")
        float(value.split()[0])
        if name.endswith("_created"):
            continue
        belongs = name.startswith(current) and name[len(current) :] in _SUFFIXES
        family = current if belongs else name
        if family not in families:
            families[family] = ("untyped", texts.get(family, ""), [])
        # Lines that name their engine as the router does stay as they are. So does every line of a
        # page without an engine, since it ends in the empty label.
        if f",{label}" not in f",{labels}":
            others, num_found = _ENGINE.subn(lambda found: found[1] + label, labels)
            shown = others if num_found else f"{label},{labels}".rstrip(",")
            line = f"{name}{{{shown}}} {value}"
        families[family][2].append(line)
    return families
