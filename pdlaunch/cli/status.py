"""``pdlaunch status`` shows once what a deployment is doing. ``top`` and the status line of
``serve`` show the same cells, lines and figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.cli.options import ApiKeyOption, UrlArgument
from pdlaunch.cli.output import FormatOption, print_errors, print_json, print_table
from pdlaunch.config.roles import ROLES
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import read_status, reading_api
from pdlaunch.observe.logs import escape_controls
from pdlaunch.protocol.status import DeploymentStatus, EngineStatus, PairStatus, Percentiles

UNKNOWN = "-"
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=+*#%"


def amount(value: float | None, unit: str = "") -> str:
    """Write three digits: 0.95, 12.3, 4.33k, 1.99G."""
    if value is None:
        return UNKNOWN
    for limit, scale, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{_digits(value / scale)}{letter}{unit}"
    return f"{_digits(value)}{unit}"


def _digits(value: float) -> str:
    if value == int(value) and abs(value) < 10_000:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """Write a share of 1: 42%."""
    return UNKNOWN if share is None else f"{share:.0%}"


def milliseconds(value: float | None) -> str:
    """Write 0.95 ms, 123 ms, 12.3 s."""
    if value is None:
        return UNKNOWN
    return f"{value / 1000:.1f} s" if value >= 10_000 else f"{_digits(value)} ms"


def times(found: Percentiles | None) -> str:
    """Write the median and the 95th percentile."""
    return f"{milliseconds(found.p50)} (p95 {milliseconds(found.p95)})" if found else UNKNOWN


def duration(seconds: float) -> str:
    """Write 42 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86_400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def time_of_day(at: float) -> str:
    """Write a Unix time as the clock on the wall shows it."""
    return datetime.fromtimestamp(at).strftime("%H:%M:%S")


def sparkline(points: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """Draw the last ``width`` points, the highest as a whole block."""
    bars = _PLAIN_BARS if ascii_only else _BARS
    shown = points[-width:]
    top = max(shown, default=0.0) or 1.0
    return "".join(bars[min(len(bars) - 1, int(point / top * len(bars)))] for point in shown)


def engine_cells(engine: EngineStatus) -> Mapping[str, Any]:
    """Return the figures of an engine, by column."""
    reading = engine.reading
    cache = (reading.cache if reading else None) or {}
    hits = [cache.get(tier) for tier in ("device", "host", "remote")]
    return {
        "engine": engine.name,
        "role": engine.role,
        "host": engine.host,
        "state": engine.shown_state + (" (down)" if engine.is_down else ""),
        "load": engine.load,
        "running": reading.running if reading else None,
        "waiting": reading.waiting if reading else None,
        "kv": percent(reading.kv_usage if reading else None),
        "host_kv": percent(reading.host_usage if reading else None),
        "device": percent(hits[0]),
        "host_hits": percent(hits[1]),
        "remote": percent(hits[2]),
        "hits": "/".join(map(percent, hits)) if cache else UNKNOWN,
        "rate": amount(reading.pulled_bytes_per_s if reading else None, "B/s"),
    }


def pair_cells(pair: PairStatus) -> Mapping[str, Any]:
    """Return the figures of a pair, by column."""
    return {
        "pair": f"{pair.prefill} -> {pair.decode}",
        "path": pair.path,
        "measured": amount(pair.gigabytes_per_s, " GB/s"),
        "speed": amount(pair.shown_gigabytes_per_s, " GB/s"),
        "rate": amount(pair.bytes_per_s, "B/s"),
        "moved": amount(pair.num_bytes, "B"),
        "pulls": pair.pulls,
    }


def head_lines(found: DeploymentStatus) -> list[str]:
    """Return what the deployment as a whole does, in two lines."""
    rates = found.rates
    return [
        f"{escape_controls(found.model)} · {found.state} · up {duration(found.uptime_s)} · "
        f"pdlaunch {found.version}",
        f"{amount(rates.requests_per_s)} requests/s · {amount(rates.output_tokens_per_s)} tokens/s "
        f"· {found.in_flight} in flight · first token {times(rates.first_token_ms)} · "
        f"between tokens {times(rates.inter_token_ms)} · {found.requests} requests, "
        f"{found.errors} errors",
    ]


def troubles(found: DeploymentStatus) -> list[str]:
    """Return a line for each engine and pair that is not used, or failed."""
    lines = []
    for engine in found.engines:
        if engine.reason:
            lines.append(f"{engine.name}: {engine.reason}")
        if engine.left_out:
            lines.append(f"{engine.name} gets nothing new: {engine.left_out}")
    for pair in found.pairs:
        name = f"{pair.prefill} -> {pair.decode}"
        if pair.last_failure:
            lines.append(f"{name}: {pair.last_failure}")
        if pair.health == "open":
            lines.append(f"{name}: no pull is begun for a while")
    lines += [f"{each.prefill} -> {each.decode} is not used: {each.error}" for each in found.doubts]
    return [escape_controls(line) for line in lines]


def down(found: DeploymentStatus) -> list[str]:
    """Return the names of engines that are down or gone."""
    names = [engine.name for engine in found.engines if engine.is_down]
    return names + [engine.name for engine in found.gone]


def status_line(found: DeploymentStatus, num_errors: int) -> str:
    """Say in one line what the deployment does; ``num_errors``: those that were told before."""
    rates = found.rates
    read = [(engine.role, engine.reading) for engine in found.engines if engine.reading is not None]
    usages = {
        role: [reading.kv_usage for of, reading in read if of == role]
        for role in ROLES
        if any(of == role for of, _ in read)
    }
    kv = [f"{role} {percent(sum(shares) / len(shares))}" for role, shares in usages.items()]
    new_errors = max(0, found.errors - num_errors)
    parts = [
        f"{amount(rates.requests_per_s)} requests/s",
        f"{amount(rates.output_tokens_per_s)} tokens/s",
        f"{sum(reading.running for _, reading in read)} running",
        f"{sum(reading.waiting for _, reading in read)} waiting",
        f"KV {' '.join(kv) or UNKNOWN}",
        f"pulls {sum(reading.pulled_bytes_per_s for _, reading in read) / 1e9:.2f} GB/s",
        f"{new_errors} error{'' if new_errors == 1 else 's'}",
    ]
    if names := down(found):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append(f"down: {', '.join(names[:3])}{more}")
    return ", ".join(parts)


NUM_EVENTS = 10

_ENGINES = {name: name for name in ("engine", "role", "host", "state", "load", "running")}
_ENGINES |= {"waiting": "waiting", "kv": "KV", "host_kv": "host\nKV", "device": "device\nhits"}
_ENGINES |= {"host_hits": "host\nhits", "remote": "pulled", "rate": "pulls/s"}
_PAIRS = {"pair": "pair", "path": "path", "measured": "measured", "speed": "speed"}
_PAIRS |= {"rate": "now", "moved": "moved", "pulls": "pulls"}


def status(
    url: UrlArgument = None, api_key: ApiKeyOption = None, output: FormatOption = "table"
) -> None:
    """Show engines with their load and caches, pairs with their speed, rates and events."""
    try:
        found = read_status(reading_api(url, api_key))
    except PdlaunchError as error:
        print_errors([error])
        raise typer.Exit(1) from None
    if output == "json":
        print_json(found)
    else:
        print_status(found, Console())


def print_status(found: DeploymentStatus, console: Console) -> None:
    """Print all that a deployment says of itself, for people."""

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    for text in head_lines(found):
        line(text)
    print_table([engine_cells(engine) for engine in found.engines], _ENGINES, console)
    for gone in found.gone:
        line(f"{escape_controls(gone.name)} has been gone for {duration(gone.gone_s)}", "red")
    if found.pairs:
        print_table([pair_cells(pair) for pair in found.pairs], _PAIRS, console)
    if found.num_pairs > len(found.pairs):
        line(f"… and {found.num_pairs - len(found.pairs)} more pairs")
    for text in troubles(found):
        line(text, "red")
    for event in found.events[-NUM_EVENTS:]:
        text = f"{time_of_day(event.at)} {event.name or 'launch'}: {event.text}"
        line(escape_controls(text), "red" if event.is_bad else "dim")
