"""``pdlaunch status`` and ``pdlaunch top``, and the status line of ``pdlaunch serve``."""

import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.cli.options import ApiKeyOption, UrlOption
from pdlaunch.cli.output import (
    FormatOption,
    counted,
    ending_at_errors,
    fitting,
    make_table,
    print_errors,
    print_json,
)
from pdlaunch.config.roles import ROLES
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import Api, read_status, reading_api
from pdlaunch.observe.logs import escape_controls
from pdlaunch.protocol.bottleneck import bottleneck_line
from pdlaunch.protocol.control import PairReady
from pdlaunch.protocol.status import DeploymentStatus, EngineStatus, Percentiles

UNKNOWN = "-"
NUM_EVENTS = 10
_WIDE = 1000  # width of the output into a pipe, in characters
_ENGINES = {"engine": "engine", "role": "role", "host": "host", "state": "state", "load": "load"}
_ENGINES |= {"running": "run", "waiting": "wait", "kv": "KV", "host_kv": "host KV"}
_ENGINES |= {"hits": "dev/host/pull", "rate": "pulls"}
_SPARE_OF_ENGINES = ("hits", "rate", "host_kv", "load", "role", "host")  # dropped in this order
_PAIRS = {"pair": "pair", "path": "path", "speed": "speed", "rate": "now", "moved": "moved"}


def amount(value: float | None, unit: str = "") -> str:
    """Write three digits: 0.95, 12.3, 43.3k, 1.99 GB."""
    if value is None:
        return UNKNOWN
    space = " " if unit else ""
    for limit, scale, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{_digits(value / scale)}{space}{letter}{unit}"
    return f"{_digits(value)}{space}{unit}"


def _digits(value: float) -> str:
    if value == int(value) and abs(value) < 10_000:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"


def milliseconds(value: float | None) -> str:
    """Write 0.95 ms, 123 ms, 12.3 s."""
    if value is None:
        return UNKNOWN
    return f"{value / 1000:.1f} s" if value >= 10_000 else f"{_digits(value)} ms"


def _times(found: Percentiles | None) -> str:
    return f"{milliseconds(found.p50)} (p95 {milliseconds(found.p95)})" if found else UNKNOWN


def duration(seconds: float) -> str:
    """Write 42 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86_400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def status(
    url: UrlOption = None, api_key: ApiKeyOption = None, output: FormatOption = "table"
) -> None:
    """Show engines with their load and caches, pairs with their speed, rates and events."""
    with ending_at_errors():
        found = read_status(reading_api(url, api_key))
    if output == "json":
        print_json(found)
        return
    console = Console()
    if not console.is_terminal:
        console.width = _WIDE
    for part in deployment_view(found, console.width):
        console.print(part)


def deployment_view(
    found: DeploymentStatus, width: int, room: int | None = None
) -> Iterator[RenderableType]:
    """Yield the status as text that fits ``width`` characters and ``room`` lines. Tables leave out
    rows that do not fit, and say how many.
    """

    def line(text: str, style: str = "") -> Text:
        return Text(text, style=style, no_wrap=room is not None, overflow="crop")

    rates, num_down = found.rates, len(down(found))
    num_engines = counted(len(found.engines), "engine")
    yield line(
        f"{escape_controls(found.model)}  {found.state}  up {duration(found.uptime_s)}  "
        f"{num_engines}{f', {num_down} down' if num_down else ''}  pdlaunch "
        f"{found.version}  {_time_of_day(found.at)}",
        "bold red" if num_down else "bold",
    )
    requests, tokens = amount(rates.requests_per_s), amount(rates.output_tokens_per_s)
    yield line(f"{requests} requests/s  {tokens} tokens/s  {found.in_flight} in flight")
    yield line(
        f"TTFT {_times(rates.first_token_ms)}  ITL {_times(rates.inter_token_ms)}  "
        f"{counted(found.requests, 'request')}, {counted(found.errors, 'error')}"
    )
    # Problems, pairs and events get at most a quarter of the lines each; engines get the rest.
    quarter = None if room is None else max(2, room // 4)
    problems, events = troubles(found)[:quarter], found.events[-(quarter or NUM_EVENTS) :]
    # The head has three lines, bottleneck and routes have one each, a table one of headings.
    num_others = 4 + bool(found.routes) + min(quarter or 0, len(found.pairs) + 1)
    num_others += len(problems) + len(events)
    # Engines that are down come first, so that a small screen shows them.
    ordered = sorted(found.engines, key=lambda engine: (not engine.is_down, engine.name))
    engines = [_engine_cells(engine) for engine in ordered]
    headings = dict(_ENGINES)
    if len({engine.host for engine in found.engines}) < 2:
        del headings["host"]
    if all(row["host_kv"] == UNKNOWN for row in engines):
        del headings["host_kv"]
    headings = fitting(engines, headings, width, _SPARE_OF_ENGINES)
    yield make_table(engines, headings, None if room is None else max(2, room - num_others))
    yield from (line(text, "red") for text in problems)
    pairs = [
        {
            "pair": f"{pair.prefill} -> {pair.decode}",
            "path": pair.path,
            "speed": amount(pair.shown_gigabytes_per_s, "GB/s"),
            "rate": amount(pair.pulls.bytes_per_s, "B/s"),
            "moved": amount(pair.pulls.num_bytes, "B"),
        }
        for pair in found.pairs
    ]
    if pairs:
        yield make_table(pairs, fitting(pairs, _PAIRS, width, ("moved", "path", "rate")), quarter)
    yield line(escape_controls(bottleneck_line(found.bottleneck)))
    if found.routes:
        routes = escape_controls(", ".join(map(str, found.routes)))
        yield line(f"routes of the last prompts: {routes}")
    for event in events:
        text = f"{_time_of_day(event.at)} {event.name or 'launch'}: {event.text}"
        yield line(escape_controls(text), "red" if event.is_bad else "dim")


def _time_of_day(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%H:%M:%S")


def _engine_cells(engine: EngineStatus) -> dict[str, Any]:
    reading = engine.reading
    cache = (reading.cache if reading else None) or {}
    hits = [_percent(cache.get(tier)) for tier in ("device", "host", "remote")]
    state = "DOWN" if engine.is_down else engine.shown_state
    style = {"ready": "", "DOWN": "bold red"}.get(state, "yellow")
    return {
        **{"engine": engine.name, "role": engine.role, "host": engine.host, "load": engine.load},
        **{"state": state, "style": style, "hits": "/".join(hits) if cache else UNKNOWN},
        "running": reading.running if reading else None,
        "waiting": reading.waiting if reading else None,
        "kv": _percent(reading.kv_usage if reading else None),
        "host_kv": _percent(reading.host_usage if reading else None),
        "rate": amount(reading.pulls.bytes_per_s if reading else None, "B/s"),
    }


def troubles(found: DeploymentStatus) -> list[str]:
    """Return a line for each engine and pair that is gone, not used, failed or slow."""
    lines = [f"{gone.name} has been gone for {duration(gone.gone_s)}" for gone in found.gone]
    for engine in found.engines:
        if engine.reason:
            lines.append(f"{engine.name}: {engine.reason}")
        if engine.left_out:
            lines.append(f"{engine.name} gets no new work: {engine.left_out}")
    for pair in found.pairs:
        name = f"{pair.prefill} -> {pair.decode}"
        if pair.last_failure:
            lines.append(f"{name}: {pair.last_failure}")
        if pair.slow:
            lines.append(f"{name} is slow: {pair.slow}")
        if pair.health == "open":
            lines.append(f"{name}: no new pulls for a while")
    return [escape_controls(line) for line in lines]


def down(found: DeploymentStatus) -> list[str]:
    """Return the names of engines that are down or gone."""
    names = [engine.name for engine in found.engines if engine.is_down]
    return names + [engine.name for engine in found.gone]


def pair_line(pair: PairReady) -> str:
    """Describe a measured pair in one line: its path, its speed, and the paths not in use."""
    speed = "" if pair.gigabytes_per_s is None else f", {pair.gigabytes_per_s:.1f} GB/s"
    others = "".join(f"; {path}: {said}" for path, said in pair.other_paths.items())
    return f"{pair.peer} → {pair.local}: {pair.path}{speed}{others}"


def status_line(found: DeploymentStatus, num_errors: int) -> str:
    """Return the status in one line; ``num_errors``: errors that earlier lines have counted."""
    read = [(engine.role, engine.reading) for engine in found.engines if engine.reading is not None]
    usages = {role: [reading.kv_usage for of, reading in read if of == role] for role in ROLES}
    kv = [f"{role} {_percent(sum(of) / len(of))}" for role, of in usages.items() if of]
    parts = [
        f"{amount(found.rates.requests_per_s)} requests/s",
        f"{amount(found.rates.output_tokens_per_s)} tokens/s",
        f"{sum(reading.running for _, reading in read)} running",
        f"{sum(reading.waiting for _, reading in read)} waiting",
        f"KV {' '.join(kv) or UNKNOWN}",
        f"pulls {amount(sum(reading.pulls.bytes_per_s for _, reading in read), 'B/s')}",
        counted(max(0, found.errors - num_errors), "error"),
    ]
    if names := down(found):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append(f"down: {', '.join(names[:3])}{more}")
    return ", ".join(parts)


READ_TIMEOUT_S = 5.0


def top(
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    every: float = typer.Option(1.0, min=0.2, max=3600.0, help="Seconds between two updates."),
) -> None:
    """Watch engines, pairs and events until Ctrl-C.

    `pdlaunch status` prints the same once, for pipes.
    """
    console = Console()
    if not console.is_terminal:
        print_errors(["pdlaunch top needs a terminal; pdlaunch status prints the same once"])
        raise typer.Exit(EXIT_UNUSABLE)
    with ending_at_errors():
        api = reading_api(url, api_key, READ_TIMEOUT_S)
        _watch(api, read_status(api), console, every)


def _watch(api: Api, status: DeploymentStatus, console: Console, every_s: float) -> None:
    """Show the deployment until Ctrl-C; if it does not answer, its last status and the error."""
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            head = "Ctrl-C ends"
            try:
                status = read_status(api)
            except PdlaunchError as error:
                head = str(error)
            live.update(page(status, head, *console.size), refresh=True)
            time.sleep(every_s)


def page(status: DeploymentStatus, head: str, width: int, num_lines: int) -> Group:
    """Return the content of a screen of this size."""
    first = Text(escape_controls(head), style="reverse", no_wrap=True, overflow="crop")
    return Group(first, *deployment_view(status, width, num_lines - 1))
