"""Lays out what ``pdlaunch top`` shows, for a screen of any size; holds no terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.text import Text

from pdlaunch.cli.figures import amount, bar, milliseconds, percent, sparkline, times
from pdlaunch.cli.keys import Key
from pdlaunch.cli.status import time_of_day
from pdlaunch.cli.waterfall import request_line, span_rows
from pdlaunch.observe.logs import escape_controls
from pdlaunch.protocol.requests import RequestSummary, RequestTrace
from pdlaunch.protocol.status import DeploymentStatus, EngineStatus, PairStatus

SORTS: dict[str, Callable[[EngineStatus], Any]] = {
    "name": lambda engine: engine.name,
    "load": lambda engine: -engine.load,
    "KV": lambda engine: -(engine.reading.kv_usage if engine.reading else 0.0),
    "state": lambda engine: (not engine.is_down, engine.shown_state == "ready"),
}
_KEYS = "q quit  s sort  p pause  up/down choose  enter trace"
_TRACE_KEYS = "q back  up/down scroll"
_NARROW = 100


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Holds what was read last. ``error``: why nothing newer could be."""

    status: DeploymentStatus | None = None
    requests: Sequence[RequestSummary] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Screen:
    """Holds what the keys have chosen; ``press`` returns the next one."""

    sort: str = "name"
    paused: bool = False
    chosen: int = 0
    trace: RequestTrace | None = None
    scroll: int = 0
    wants_trace: bool = False
    """The trace of the chosen request is to be read."""
    is_over: bool = False

    def press(self, key: Key, num_requests: int) -> Screen:
        """Return what the screen becomes."""
        if self.trace is not None:
            match key:
                case "q" | "escape" | "enter" | "left":
                    return replace(self, trace=None, scroll=0)
                case "down" | "j":
                    return replace(self, scroll=self.scroll + 1)
                case "up" | "k":
                    return replace(self, scroll=max(0, self.scroll - 1))
                case _:
                    return self
        names = list(SORTS)
        match key:
            case "q" | "escape":
                return replace(self, is_over=True)
            case "s":
                return replace(self, sort=names[(names.index(self.sort) + 1) % len(names)])
            case "p" | " ":
                return replace(self, paused=not self.paused)
            case "down" | "j":
                return replace(self, chosen=min(max(0, num_requests - 1), self.chosen + 1))
            case "up" | "k":
                return replace(self, chosen=max(0, self.chosen - 1))
            case "enter" | "t" | "right" if num_requests:
                return replace(self, wants_trace=True)
            case _:
                return self


def shown_requests(requests: Sequence[RequestSummary]) -> list[RequestSummary]:
    """Return the slowest that run, or the slowest that have ended while none runs."""
    running = [request for request in requests if request.state == "running"]
    return running or list(requests)


def lay_out(
    snapshot: Snapshot, screen: Screen, columns: int, rows: int, *, ascii_only: bool = False
) -> list[Text]:
    """Return the lines of the screen, at most ``rows`` of them and none wider than ``columns``."""
    if screen.trace is not None:
        lines = _trace(screen.trace, screen.scroll, columns, rows, ascii_only=ascii_only)
    elif snapshot.status is None:
        lines = [
            Text("pdlaunch top"),
            Text(escape_controls(snapshot.error) or "asking the router ..."),
        ]
    else:
        lines = _deployment(snapshot, snapshot.status, screen, columns, rows, ascii_only=ascii_only)
    for line in lines:
        line.truncate(columns, overflow="crop")
    return lines[:rows]


def _trace(
    trace: RequestTrace, scroll: int, columns: int, rows: int, *, ascii_only: bool
) -> list[Text]:
    line = request_line(trace)
    head = [line[start : start + columns] for start in range(0, len(line), columns)]
    head = head[: max(1, rows // 2)]
    body = list(span_rows(trace, columns, is_ascii=ascii_only))
    room = max(1, rows - len(head) - 2)
    first = min(scroll, max(0, len(body) - room))
    shown = [Text(""), *body[first : first + room]]
    padding = [Text("")] * (rows - len(head) - len(shown) - 1)
    return [*head, *shown, *padding, Text(_TRACE_KEYS, style="reverse")]


def _deployment(
    snapshot: Snapshot,
    status: DeploymentStatus,
    screen: Screen,
    columns: int,
    rows: int,
    *,
    ascii_only: bool,
) -> list[Text]:
    head = _head(status, screen, columns, ascii_only=ascii_only)
    foot = Text(f"{_KEYS}  (engines by {screen.sort})", style="reverse")
    if snapshot.error:
        foot = Text(escape_controls(snapshot.error), style="bold red")
    requests = shown_requests(snapshot.requests)
    engines = sorted(status.engines, key=SORTS[screen.sort])
    # Of the rows, headings and foot are gone; engines get half of the rest, and what others leave.
    room = max(3, rows - len(head) - 4)
    host = _host_columns(engines, columns)
    num_requests = min(max(1, len(requests)), max(1, room // 4))
    num_pairs = min(max(1, len(status.pairs)), max(1, room // 4))
    num_engines = max(1, room - num_requests - num_pairs)
    lines = [*head, _heading(_engine_heading(columns, host))]
    gone = [Text(f"  {escape_controls(each.name):<14} gone", style="red") for each in status.gone]
    shown = [_engine(engine, columns, host, ascii_only=ascii_only) for engine in engines]
    lines += _first([*shown, *gone], num_engines)
    lines.append(_heading(f"  {'pair':<26} {'path':<20} {'measured':>10} {'now':>9} {'moved':>9}"))
    lines += _first([_pair(pair) for pair in status.pairs], num_pairs)
    kind = "slowest running" if requests and requests[0].state == "running" else "slowest of late"
    lines.append(_heading(f"  {kind:<20} {'engines':<24} {'prompt':>7} {'first':>9} {'total':>9}"))
    chosen = min(screen.chosen, max(0, len(requests) - 1))
    first = max(0, chosen - num_requests + 1)
    lines += [
        _request(request, is_chosen=index == chosen)
        for index, request in enumerate(requests[first : first + num_requests], start=first)
    ]
    lines += [Text("")] * (rows - len(lines) - 1)
    return [*lines[: rows - 1], foot]


def _head(
    status: DeploymentStatus, screen: Screen, columns: int, *, ascii_only: bool
) -> list[Text]:
    now, width = status.rates, max(8, min(40, columns // 6))
    requests = [point.requests_per_s for point in status.history]
    tokens = [point.output_tokens_per_s for point in status.history]
    paused = "  PAUSED" if screen.paused else ""
    down = sum(engine.is_down for engine in status.engines) + len(status.gone)
    return [
        Text(
            f"{escape_controls(status.model)}  {status.state}  {len(status.engines)} engines"
            f"{f', {down} down' if down else ''}  {status.in_flight} in flight  "
            f"{status.errors} errors  {time_of_day(status.at)}{paused}",
            style="bold red" if down else "bold",
        ),
        Text(
            f"requests/s {amount(now.requests_per_s):>6} "
            f"{sparkline(requests, width, ascii_only=ascii_only)}  "
            f"tokens/s {amount(now.output_tokens_per_s):>6} "
            f"{sparkline(tokens, width, ascii_only=ascii_only)}"
        ),
        Text(f"first token {times(now.first_token_ms)}  between {times(now.inter_token_ms)}"),
    ]


def _heading(text: str) -> Text:
    return Text(text, style="underline")


def _first(lines: list[Text], room: int) -> list[Text]:
    """Return the lines that fit; the last one says how many do not."""
    if not lines:
        return [Text("  none", style="dim")]
    if len(lines) <= room:
        return lines
    return [*lines[: room - 1], Text(f"  ... and {len(lines) - room + 1} more", style="dim")]


def _host_columns(engines: Sequence[EngineStatus], columns: int) -> int:
    """Return how wide the column of hosts is; 0: there is none, as all engines are on one."""
    if len({engine.host for engine in engines}) < 2:
        return 0
    return 15 if columns >= _NARROW else 12


def _shows_pulls(columns: int, host: int) -> bool:
    """Tell whether engines' pulls have room beside hosts; pairs show them too."""
    return columns >= _NARROW or not host


def _engine_heading(columns: int, host: int) -> str:
    kv = 18 if columns >= _NARROW else 11
    pulls = f"{'pulls':>10}" if _shows_pulls(columns, host) else ""
    return (
        f"  {'engine':<14} {'host'[:host]:<{host}}{'state':<9} {'load':>4} {'run':>4} {'wait':>4} "
        f"{'KV':<{kv}} {'dev/host/pull':>14}{pulls}"
    )


def _engine(engine: EngineStatus, columns: int, host: int, *, ascii_only: bool) -> Text:
    reading, width = engine.reading, 12 if columns >= _NARROW else 5
    style = "green" if engine.shown_state == "ready" else "bold red" if engine.is_down else "yellow"
    line = Text("  ").append(f"{escape_controls(engine.name)[:14]:<14} ")
    if host:
        line.append(f"{escape_controls(engine.host)[: host - 1]:<{host}}")
    state = "DOWN" if engine.is_down else escape_controls(engine.shown_state)
    line.append(f"{state[:9]:<9} ", style=style).append(f"{engine.load:>4} ")
    if reading is None:
        return line.append("not read yet", style="dim")
    cache = reading.cache
    hits = f"{cache.device:.0%}/{cache.host:.0%}/{cache.remote:.0%}" if cache is not None else "-"
    usage = f"{bar(reading.kv_usage, width, ascii_only=ascii_only)} {percent(reading.kv_usage):>4}"
    line.append(f"{reading.running:>4} {reading.waiting:>4} {usage} {hits:>15}")
    if _shows_pulls(columns, host):
        line.append(f" {amount(reading.pulled_bytes_per_s, 'B/s'):>9}")
    return line


def _pair(pair: PairStatus) -> Text:
    name = escape_controls(f"{pair.prefill} -> {pair.decode}")[:26]
    speed = pair.shown_gigabytes_per_s
    line = Text(
        f"  {name:<26} {escape_controls(pair.path)[:20]:<20} {amount(speed, ' GB/s'):>10} "
        f"{amount(pair.bytes_per_s, 'B/s'):>9} {amount(pair.num_bytes, 'B'):>9}"
    )
    if pair.health != "closed":
        line.append("  left out" if pair.health == "open" else "  on trial", style="yellow")
    if pair.last_failure:
        line.append(f"  {escape_controls(pair.last_failure)}", style="red")
    return line


def _request(request: RequestSummary, *, is_chosen: bool) -> Text:
    total = milliseconds(request.total_ms)
    return Text(
        f"{'>' if is_chosen else ' '} {escape_controls(request.id)[:20]:<20} "
        f"{escape_controls(request.route or '-')[:24]:<24} {amount(request.prompt_tokens):>7} "
        f"{milliseconds(request.first_token_ms):>9} {total:>9}"
        f"{f'  {request.status}' if request.status not in (None, 200) else ''}",
        style="reverse" if is_chosen else "",
    )
