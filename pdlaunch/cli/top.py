"""``pdlaunch top`` shows a deployment on the whole screen, as it changes."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console, JustifyMethod
from rich.layout import Layout
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.cli.options import ApiKeyOption, UrlArgument
from pdlaunch.cli.output import print_errors
from pdlaunch.cli.status import (
    amount,
    down,
    engine_cells,
    milliseconds,
    pair_cells,
    sparkline,
    time_of_day,
    times,
    troubles,
)
from pdlaunch.cli.trace import request_line, span_rows
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import read_requests, read_status, read_trace, reading_api
from pdlaunch.launch.client.api import Api
from pdlaunch.observe.logs import escape_controls
from pdlaunch.protocol.status import DeploymentStatus, EngineStatus, RequestSummary, RequestTrace

NUM_REQUESTS = 50
READ_TIMEOUT_S = 5.0
_KEY_WAIT_S = 0.1
SORTS: dict[str, Callable[[EngineStatus], Any]] = {
    "name": lambda engine: engine.name,
    "load": lambda engine: -engine.load,
    "KV": lambda engine: -(engine.reading.kv_usage if engine.reading else 0.0),
    "state": lambda engine: (not engine.is_down, engine.shown_state == "ready"),
}
_KEYS = "q quit  s sort  p pause  up/down choose  enter trace"
_TRACE_KEYS = "q back  up/down scroll"
# What a terminal sends, in both of its modes.
_SEQUENCES = {b"A": "up", b"B": "down", b"C": "enter", b"D": "escape"}
_STYLES = {"ready": "", "DOWN": "bold red", "gone": "red"}
_ALIASES = {"k": "up", "j": "down", "\r": "enter", "\n": "enter", "t": "enter", " ": "p"}

_ENGINES = {"engine": "engine", "state": "state", "load": "load", "running": "run"}
_ENGINES |= {"waiting": "wait", "kv": "KV", "hits": "dev/host/pull", "rate": "pulls"}
_PAIRS = {"pair": "pair", "path": "path", "speed": "speed", "rate": "now", "moved": "moved"}
_REQUESTS = {"engines": "engines", "prompt": "prompt", "first": "first", "total": "total"}
_REQUESTS |= {"status": ""}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Holds what was read last. ``error``: why nothing newer could be."""

    status: DeploymentStatus | None = None
    requests: Sequence[RequestSummary] = ()
    error: str = ""

    @property
    def shown_requests(self) -> Sequence[RequestSummary]:
        """Return the slowest that run, or the slowest that have ended while none runs."""
        return [each for each in self.requests if each.state == "running"] or self.requests


@dataclass(frozen=True, slots=True)
class Screen:
    """Holds what the keys have chosen."""

    sort: str = "name"
    paused: bool = False
    chosen: int = 0
    trace: RequestTrace | None = None
    scroll: int = 0
    wants_trace: bool = False  # the trace of the chosen request is to be read
    is_over: bool = False

    def press(self, key: str, num_requests: int) -> Screen:
        """Return what the screen becomes."""
        if self.trace is not None:
            match key:
                case "q" | "escape" | "enter":
                    return replace(self, trace=None, scroll=0)
                case "down" | "up":
                    return replace(self, scroll=max(0, self.scroll + (1 if key == "down" else -1)))
                case _:
                    return self
        match key:
            case "q" | "escape":
                return replace(self, is_over=True)
            case "s":
                names = list(SORTS)
                return replace(self, sort=names[(names.index(self.sort) + 1) % len(names)])
            case "p":
                return replace(self, paused=not self.paused)
            case "down":
                return replace(self, chosen=min(max(0, num_requests - 1), self.chosen + 1))
            case "up":
                return replace(self, chosen=max(0, self.chosen - 1))
            case "enter" if num_requests:
                return replace(self, wants_trace=True)
            case _:
                return self


class Poller:
    """Reads the deployment in a thread of its own, so that keys are never waited for."""

    def __init__(self, api: Api, every_s: float) -> None:
        self._api = api
        self._every_s = every_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="top", daemon=True)
        self.snapshot = Snapshot()
        """Replaced as a whole; belongs to the thread."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.is_set():
            begin_at = time.monotonic()
            try:
                requests = read_requests(self._api, "slowest", NUM_REQUESTS)
                self.snapshot = Snapshot(read_status(self._api), requests)
            except Exception as error:
                # What was known stays on the screen. Of whatever kind the error is: without this
                # thread the screen would stand still and not say why.
                self.snapshot = replace(self.snapshot, error=str(error) or repr(error))
            self._is_over.wait(max(0.0, self._every_s - (time.monotonic() - begin_at)))


def top(
    url: UrlArgument = None,
    api_key: ApiKeyOption = None,
    every: Annotated[
        float, typer.Option(min=0.2, max=3600.0, help="Seconds between two looks.")
    ] = 1.0,
) -> None:
    """Watch engines, pairs and the slowest requests; keys sort, pause, and open a request's trace.

    `pdlaunch status` prints the same once, for pipes.
    """
    console = Console()
    if not (console.is_terminal and sys.stdin.isatty()):
        print_errors(["pdlaunch top needs a terminal; pdlaunch status prints the same once"])
        raise typer.Exit(EXIT_UNUSABLE)
    try:
        api = reading_api(url, api_key, READ_TIMEOUT_S)
        read_status(api)
    except PdlaunchError as error:
        print_errors([error])
        raise typer.Exit(1) from None
    poller = Poller(api, every)
    poller.start()
    try:
        _watch(poller, api, console)
    except EOFError:
        raise typer.Exit(1) from None
    finally:
        poller.stop()


def _watch(poller: Poller, api: Api, console: Console) -> None:
    """Show and obey keys until one says that it is over."""
    screen, shown, drawn = Screen(), poller.snapshot, None
    ascii_only = not console.encoding.lower().startswith("utf")
    with (
        _single_keys(sys.stdin.fileno()) as read_keys,
        Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live,
    ):
        while not screen.is_over:
            if not screen.paused:
                shown = poller.snapshot
            state = (shown, screen, console.size)
            if state != drawn:
                page = lay_out(shown, screen, *console.size, ascii_only=ascii_only)
                live.update(page, refresh=True)
                drawn = state
            requests = shown.shown_requests
            for key in read_keys():
                screen = screen.press(key, len(requests))
            if screen.wants_trace:
                chosen = requests[min(screen.chosen, len(requests) - 1)]
                try:
                    screen = replace(screen, trace=read_trace(api, chosen.id))
                except PdlaunchError as error:
                    shown = replace(shown, error=str(error))
                screen = replace(screen, wants_trace=False)


@contextlib.contextmanager
def _single_keys(descriptor: int) -> Iterator[Callable[[], list[str]]]:
    """Have the terminal give keys at once, and not show them, while the block runs; yields what
    reads them. Ctrl-C still interrupts.
    """
    # Imported here: systems without it can still list commands.
    import termios
    import tty

    def read_keys() -> list[str]:
        if not select.select([descriptor], [], [], _KEY_WAIT_S)[0]:
            return []
        read = os.read(descriptor, 1024)
        if not read:
            raise EOFError("the terminal is gone")
        if read.startswith((b"\x1b[", b"\x1bO")):
            return [_SEQUENCES.get(read[2:3], "")]
        keys = ["escape"] if read.startswith(b"\x1b") else list(read.decode("latin-1"))
        return [_ALIASES.get(key, key) for key in keys]

    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield read_keys
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def lay_out(
    snapshot: Snapshot, screen: Screen, columns: int, rows: int, *, ascii_only: bool = False
) -> Layout:
    """Return what is shown on a screen of this size."""
    status, trace = snapshot.status, screen.trace
    foot = f"{_KEYS}  (engines by {screen.sort})" if trace is None else _TRACE_KEYS
    body = Layout(Text("pdlaunch top\nasking the router ..."))
    if trace is not None:
        lines = list(span_rows(trace, columns, is_ascii=ascii_only))
        head = request_line(trace)
        height = min(-(-len(head) // columns), rows // 2) + 1
        first = min(screen.scroll, max(0, len(lines) - rows + height + 1))
        body.split_column(Layout(head, size=height), Layout(Text("\n").join(lines[first:])))
    elif status is not None:
        parts = _deployment(snapshot, status, screen, columns, rows, ascii_only=ascii_only)
        body.split_column(*parts)
    last = Text(foot, style="reverse", no_wrap=True, overflow="crop")
    if snapshot.error:
        last = Text(escape_controls(snapshot.error), style="bold red", no_wrap=True)
    whole = Layout()
    whole.split_column(body, Layout(last, size=1))
    return whole


def _deployment(
    snapshot: Snapshot,
    status: DeploymentStatus,
    screen: Screen,
    columns: int,
    rows: int,
    *,
    ascii_only: bool,
) -> list[Layout]:
    """Return head, engines, problems, pairs and requests, which share the rows."""
    requests, quarter = snapshot.shown_requests, max(2, rows // 4)
    hosts = {"host": "host"} if len({engine.host for engine in status.engines}) > 1 else {}
    engines = [_engine(engine) for engine in sorted(status.engines, key=SORTS[screen.sort])]
    engines += [{"engine": each.name, "state": "gone"} for each in status.gone]
    running = bool(requests) and requests[0].state == "running"
    headings = {"id": "slowest running" if running else "slowest of late"} | _REQUESTS
    num_shown = min(quarter, len(requests) + 1) - 1
    chosen = min(screen.chosen, max(0, len(requests) - 1))
    first = max(0, chosen - num_shown + 1)
    shown = [
        _request(each, ">" if index == chosen else " ")
        for index, each in enumerate(requests[first : first + num_shown], start=first)
    ]
    problems = Text("\n".join(troubles(status)), style="red", no_wrap=True)
    num_problems = min(len(problems.plain.splitlines()), quarter)
    num_pairs = min(quarter, len(status.pairs) + 1)
    room = max(2, rows - 4 - num_problems - num_pairs - num_shown - 1)
    line = partial(sparkline, width=max(8, min(40, columns // 6)), ascii_only=ascii_only)
    return [
        Layout(_head(status, screen, line), size=3),
        Layout(_table({"engine": "engine"} | hosts | _ENGINES, engines, room), size=room),
        Layout(problems, size=num_problems, visible=num_problems > 0),
        Layout(_table(_PAIRS, [pair_cells(pair) for pair in status.pairs], num_pairs)),
        Layout(_table(headings, shown, num_shown + 1), size=num_shown + 1),
    ]


def _head(status: DeploymentStatus, screen: Screen, line: Callable[[list[float]], str]) -> Text:
    now, num_down = status.rates, len(down(status))
    requests = line([point.requests_per_s for point in status.history])
    tokens = line([point.output_tokens_per_s for point in status.history])
    return Text.assemble(
        (
            f"{escape_controls(status.model)}  {status.state}  {len(status.engines)} engines"
            f"{f', {num_down} down' if num_down else ''}  {status.in_flight} in flight  "
            f"{status.errors} errors  {time_of_day(status.at)}"
            f"{'  PAUSED' if screen.paused else ''}\n",
            "bold red" if num_down else "bold",
        ),
        f"requests/s {amount(now.requests_per_s):>6} {requests}  "
        f"tokens/s {amount(now.output_tokens_per_s):>6} {tokens}\n",
        f"first token {times(now.first_token_ms)}  between {times(now.inter_token_ms)}",
        no_wrap=True,
        overflow="crop",
    )


def _table(headings: Mapping[str, str], rows: Sequence[Mapping[str, Any]], room: int) -> Table:
    """Return a table of at most ``room`` lines; the last one says how many rows are left out."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="underline")
    for index, heading in enumerate(headings.values()):
        justify: JustifyMethod = "left" if index < 2 else "right"
        table.add_column(heading, justify=justify, no_wrap=True, overflow="crop")
    shown = rows if len(rows) < room else rows[: max(0, room - 2)]
    for row in shown:
        style = _STYLES.get(str(row.get("state")), "yellow") if "state" in row else ""
        cells = (row.get(name) for name in headings)
        texts = ("-" if cell is None else escape_controls(str(cell)) for cell in cells)
        table.add_row(*map(Text, texts), style=style)
    if len(shown) < len(rows):
        table.add_row(Text(f"... and {len(rows) - len(shown)} more", style="dim"))
    return table


def _engine(engine: EngineStatus) -> dict[str, Any]:
    return {**engine_cells(engine)} | ({"state": "DOWN"} if engine.is_down else {})


def _request(request: RequestSummary, mark: str) -> dict[str, Any]:
    return {
        "id": f"{mark} {request.id}",
        "engines": request.route,
        "prompt": amount(request.prompt_tokens),
        "first": milliseconds(request.first_token_ms),
        "total": milliseconds(request.total_ms),
        "status": "" if request.status in (None, 200) else request.status,
    }
