"""Counts what the router does, and adds every engine's metrics to its own page."""

import asyncio
import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.samples import Sample

from pdlaunch.observe.metrics import RequestMetrics
from pdlaunch.protocol.control import ListedState, Registry
from pdlaunch.router.continuation import LOST_REASONS
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.policy import Hop, Route
from pdlaunch.router.pool import engines_of

Pair = tuple[str, str]  # names of a prefill and a decode engine
_PREFIX = "pdlaunch_router_"
_COUNTERS = {  # labels and help by name
    "engine_failures": ("engine hop", "Requests that an engine failed."),
    "retries": ("hop", "Requests sent again, to another engine or to one that is back."),
    "fallbacks": ("", "Requests that one engine did alone although there were pairs."),
    "migrations": ("", "Answers continued by another engine from the tokens so far."),
    "releases": ("", "Leases ended early because no engine will pull them."),
    "canaries": ("outcome", "Canaries that `pdlaunch router` has sent through pairs."),
    "silent_recomputes": (
        "prefill decode",
        "Prompts that decode computed although it was handed their KV blocks.",
    ),
    "lost_streams": ("reason", "Streams ended with an error: no other engine can go on with them."),
    "key_requests": ("key", "Admitted requests of an API key."),
    "key_refusals": ("key limit", "Requests of an API key beyond one of its limits."),
    "key_prompt_tokens": ("key", "Prompt tokens of an API key."),
    "key_generation_tokens": ("key", "Output tokens of an API key."),
    "key_queue_seconds": ("key", "Time that prompts of an API key waited for their turn."),
    "routes": ("kind", "Prompts by route: a pair of engines, or one engine of a role."),
}
_THERE_WITH_0: Mapping[str, Collection[str]] = {
    "retries": get_args(Hop),
    "canaries": ("proven", "failed"),
    "lost_streams": LOST_REASONS,
}
NUM_LAST_ROUTES = 100
_PAIR_SPEED, _PAIR_SLOW = "pdlaunch_pair_bytes_per_second", "pdlaunch_pair_slow"
_GAUGES = {  # set at a scrape or by a registry: labels and help by name
    f"{_PREFIX}engines_ready": ("", "Engines that can be given work."),
    f"{_PREFIX}engines": ("state", "Engines by state; failed ones get no requests for a while."),
    f"{_PREFIX}engine_info": ("engine role host", "Always 1; where an engine runs, in labels."),
    f"{_PREFIX}requests_in_flight": ("", "Prompts that are being answered."),
    f"{_PREFIX}key_prompts_running": ("key", "Prompts of an API key that are being answered."),
    f"{_PREFIX}key_prompts_waiting": ("key", "Prompts of an API key that wait for their turn."),
    _PAIR_SPEED: (
        "prefill decode holder puller path",
        "Speed between two ranks over the path in use, as measured by the handshake.",
    ),
    _PAIR_SLOW: (
        "prefill decode holder puller path",
        "1 if the pair is slow (rule PD504), else 0.",
    ),
}


class RouterMetrics:
    def __init__(self, served_model_name: str) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = RequestMetrics(registry, {"model_name": served_model_name}, prefix=_PREFIX)
        self._counters = {
            name: Counter(f"{_PREFIX}{name}", text, labels.split(), registry=registry)
            for name, (labels, text) in _COUNTERS.items()
        }
        # The supervisor counts these ends; its count starts at 0 with each launch.
        self._ends = Counter(
            "pdlaunch_process_ends",
            "Processes that ended while the launch served: they died, or hung and were killed.",
            ("process", "reason"),
            registry=registry,
        )
        self._num_ends: dict[tuple[str, str], int] = {}
        self._gauges = {
            name: Gauge(name, text, labels.split(), registry=registry)
            for name, (labels, text) in _GAUGES.items()
        }
        self.last_routes = deque[tuple[str, str]](maxlen=NUM_LAST_ROUTES)  # kinds and reasons
        for name, values in _THERE_WITH_0.items():
            for value in values:
                self._counters[name].labels(value)

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(by)

    def show_key(self, name: str, num_running: int, num_waiting: int) -> None:
        self._gauges[f"{_PREFIX}key_prompts_running"].labels(name).set(num_running)
        self._gauges[f"{_PREFIX}key_prompts_waiting"].labels(name).set(num_waiting)

    def routed(self, route: Route) -> None:
        self.count("routes", route.kind)
        self.last_routes.append((route.kind, route.reason))

    def show_registry(self, registry: Registry) -> None:
        """Show how often processes have ended, and the speed of the pairs that are proven now."""
        for process, counts in registry.ends.items():
            for reason, count in counts.items():
                known = self._num_ends.get((process, reason), 0)
                self._ends.labels(process, reason).inc(count - known)
                self._num_ends[process, reason] = count
        measured = {}
        for pair in registry.pairs:
            names = engines_of(pair)
            self._counters["silent_recomputes"].labels(*names)
            if pair.gigabytes_per_s is not None:
                measured[*names, pair.peer, pair.local, pair.path] = pair
        speeds = {labels: (pair.gigabytes_per_s or 0.0) * 1e9 for labels, pair in measured.items()}
        self._set(_PAIR_SPEED, speeds)
        self._set(_PAIR_SLOW, {labels: bool(pair.slow) for labels, pair in measured.items()})

    def show(self, engines: Sequence[Engine], in_flight: int) -> None:
        states = [engine.state for engine in engines]
        for engine in engines:
            for hop in get_args(Hop):
                self._counters["engine_failures"].labels(engine.name, hop)
        self._gauges[f"{_PREFIX}engines_ready"].set(states.count("ready"))
        self._gauges[f"{_PREFIX}requests_in_flight"].set(in_flight)
        counts = {(each,): states.count(each) for each in get_args(ListedState)}
        self._set(f"{_PREFIX}engines", counts)
        places = {(engine.name, engine.role or "", engine.place): 1 for engine in engines}
        self._set(f"{_PREFIX}engine_info", places)

    def _set(self, name: str, values: Mapping[Any, float]) -> None:
        gauge = self._gauges[name]
        gauge.clear()
        for labels, value in values.items():
            gauge.labels(*labels).set(value)

    def samples(self, names: Collection[str]) -> Iterator[Sample]:
        for metric in self._registry.restricted_registry(list(names)).collect():
            yield from metric.samples

    def text(self) -> bytes:
        return generate_latest(self._registry)


async def scrape(own_page: bytes, client: EngineClient, engines: Sequence[Engine]) -> bytes:
    """Return ``own_page`` merged with the pages of all engines that answer in time."""
    families: Families = {}
    add_page(families, own_page.decode())
    pages = await asyncio.gather(*(client.read_metrics(engine) for engine in engines))
    for engine, page in zip(engines, pages, strict=True):
        add_page(families, page or "", engine=engine.name)
        # Let streams go on between two pages: to read a page takes a millisecond or two.
        await asyncio.sleep(0)
    return render_families(families).encode()


# Possessive quantifiers (``*+``) never backtrack: they take half of the time, and no crafted page
# can make them slow.
_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*+"
_VALUE = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_LABEL = rf"[a-zA-Z_][a-zA-Z0-9_]*+={_VALUE}"
_SAMPLE = re.compile(
    rf"({_NAME})(?:\{{((?:{_LABEL},?)*+)\}})?[ \t]++"
    r"([-+]?(?:\d[\d.eE+-]*+|Inf|NaN)(?:[ \t]++-?\d++)?)[ \t]*+"
)
_HEADER = re.compile(rf"# (HELP|TYPE) ({_NAME})(?: (.*))?")
# Endings of the names of a family's samples.
_SUFFIXES = ("", "_total", "_bucket", "_sum", "_count", "_info")
_ENGINE = re.compile(rf"(^|,)engine={_VALUE}")
# Type, help and samples by name.
Families = dict[str, tuple[str, str, list[str]]]


def add_page(families: Families, page: str, *, engine: str | None = None) -> None:
    """Add a page in Prometheus's text format, its samples labelled with ``engine``, if any.

    Lines that are no samples and ``_created`` series are left out. prometheus_client's parser takes
    20 times as long.
    """
    escaped = (engine or "").replace("\\", r"\\").replace('"', r"\"")
    label = "" if engine is None else f'engine="{escaped}"'
    texts: dict[str, str] = {}
    types: dict[str, str] = {}
    current = ""
    for line in page.splitlines():
        if header := _HEADER.fullmatch(line):
            word, current, rest = header.groups("")
            (texts if word == "HELP" else types)[current] = rest
            continue
        sample = _SAMPLE.fullmatch(line)
        if sample is None or sample[1].endswith("_created"):
            continue
        name, labels, value = sample.groups("")
        belongs = name.startswith(current) and name[len(current) :] in _SUFFIXES
        family = current if belongs else name
        kind = types.get(family, "untyped")
        known = families.setdefault(family, (kind, texts.get(family, ""), []))
        # Keep lines that have this engine label already. If ``engine`` is None, ``label`` is empty,
        # so all lines are kept.
        if f",{label}" not in f",{labels}":
            others, num_found = _ENGINE.subn(lambda found: found[1] + label, labels)
            shown = others if num_found else f"{label},{labels}".rstrip(",")
            line = f"{name}{{{shown}}} {value}"
        # A family has one type on a page; samples of another type are left out.
        if known[0] == kind:
            known[2].append(line)


def render_families(families: Families) -> str:
    """Return all families as one page."""
    lines = []
    for name, (kind, text, samples) in families.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples]
    return "\n".join(lines) + "\n"
