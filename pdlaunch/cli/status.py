"""``pdlaunch status`` shows once what a deployment is doing."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.cli.figures import amount, duration, percent, times
from pdlaunch.cli.output import FormatOption, print_errors, print_json, print_table
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.requests import read_status, reading_api
from pdlaunch.observe.logs import escape_controls
from pdlaunch.protocol.status import DeploymentStatus, EngineStatus, PairStatus

UrlArgument = Annotated[
    str | None,
    typer.Argument(
        help="The deployment's router; needed where several of yours run, or another's.",
        envvar="PDLAUNCH_URL",
        metavar="[URL]",
    ),
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        help="The clients' key; not needed for your own launch on this machine.",
        envvar="PDLAUNCH_API_KEY",
        metavar="KEY",
    ),
]
NUM_EVENTS = 10

_ENGINES = {
    "engine": "engine",
    "role": "role",
    "host": "host",
    "state": "state",
    "load": "load",
    "running": "running",
    "waiting": "waiting",
    "kv": "KV",
    "host_kv": "host\nKV",
    "device": "device\nhits",
    "host_hits": "host\nhits",
    "remote": "pulled",
    "rate": "pulls/s",
}
_PAIRS = {
    "pair": "pair",
    "path": "path",
    "measured": "measured",
    "now": "last\npulls",
    "rate": "now",
    "moved": "moved",
    "pulls": "pulls",
}


def status(
    url: UrlArgument = None,
    api_key: ApiKeyOption = None,
    output: FormatOption = "table",
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
    for line in head_lines(found):
        console.print(Text(line), soft_wrap=True)
    print_table([_engine(engine) for engine in found.engines], _ENGINES, console)
    for gone in found.gone:
        text = f"{escape_controls(gone.name)} has been gone for {duration(gone.gone_s)}"
        console.print(Text(text, style="red"), soft_wrap=True)
    if found.pairs:
        print_table([_pair(pair) for pair in found.pairs], _PAIRS, console)
    if found.num_pairs > len(found.pairs):
        console.print(Text(f"… and {found.num_pairs - len(found.pairs)} more pairs"))
    for engine in found.engines:
        if engine.reason:
            _say(console, f"{engine.name}: {engine.reason}")
        if engine.left_out:
            _say(console, f"{engine.name} gets nothing new: {engine.left_out}")
    for pair in found.pairs:
        if pair.last_failure:
            _say(console, f"{pair.prefill} -> {pair.decode}: {pair.last_failure}")
        if pair.health == "open":
            _say(console, f"{pair.prefill} -> {pair.decode}: no pull is begun for a while")
    for doubt in found.doubts:
        _say(console, f"{doubt.prefill} -> {doubt.decode} is not used: {doubt.error}")
    for event in found.events[-NUM_EVENTS:]:
        line = f"{time_of_day(event.at)} {event.name or 'launch'}: {event.text}"
        console.print(
            Text(escape_controls(line), style="red" if event.is_bad else "dim"), soft_wrap=True
        )


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


def time_of_day(at: float) -> str:
    """Write a Unix time as the clock on the wall shows it."""
    return datetime.fromtimestamp(at).strftime("%H:%M:%S")


def _say(console: Console, text: str) -> None:
    console.print(Text(escape_controls(text), style="red"), soft_wrap=True)


def _engine(engine: EngineStatus) -> Mapping[str, Any]:
    reading = engine.reading
    cache = None if reading is None else reading.cache
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
        "device": percent(cache.device if cache else None),
        "host_hits": percent(cache.host if cache else None),
        "remote": percent(cache.remote if cache else None),
        "rate": amount(reading.pulled_bytes_per_s if reading else None, "B/s"),
    }


def _pair(pair: PairStatus) -> Mapping[str, Any]:
    return {
        "pair": f"{pair.prefill} -> {pair.decode}",
        "path": pair.path,
        "measured": amount(pair.gigabytes_per_s, " GB/s"),
        "now": amount(pair.pull_gigabytes_per_s, " GB/s"),
        "rate": amount(pair.bytes_per_s, "B/s"),
        "moved": amount(pair.num_bytes, "B"),
        "pulls": pair.pulls,
    }
