"""Shows what ``serve`` does: a live table while it starts, a panel once it is ready, then lines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pdlaunch.cli.output import safe
from pdlaunch.config.hosts import on_host
from pdlaunch.config.roles import ROLES
from pdlaunch.launch.status import LaunchPhase, LaunchStatus, ProcessState, ProcessStatus

Summary = Callable[[LaunchStatus], list[tuple[str, str]]]
"""Returns the lines of the ready panel: label and text, which may have several lines."""

_STYLES = {
    ProcessState.PLANNED: "dim",
    ProcessState.CONVERTING: "cyan",
    ProcessState.STARTING: "cyan",
    ProcessState.READY: "green",
    ProcessState.DRAINING: "yellow",
    ProcessState.EXITED: "dim",
    ProcessState.FAILED: "bold red",
    ProcessState.BACKING_OFF: "yellow",
    ProcessState.GIVEN_UP: "bold red",
}
CONTINUATION = " \\\n  "
"""Joins the lines of a shell command."""
_PERCENT_EVERY_S = 5.0
_BAR_FROM_COLUMNS = 70
"""Terminals with fewer columns get the percentage without a bar."""


class PlainView:
    """Prints one line for each change; for logs, pipes and dumb terminals.

    Lines of the start tell the seconds since it began, events the time of day.
    """

    def __init__(
        self,
        console: Console,
        summary: Summary,
        clock: Callable[[], float],
        wall_clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._console = console
        self._summary = summary
        self._clock = clock
        self._wall_clock = wall_clock
        self._start_at = clock()
        self._said: dict[str, tuple[tuple[ProcessState, str] | None, float]] = {}
        """The last line printed for each process, and its time."""

    def changed(self, status: LaunchStatus) -> None:
        if status.phase not in (LaunchPhase.PREPARING, LaunchPhase.STARTING):
            return
        for process in status.processes:
            if process.state is not ProcessState.PLANNED and self._is_news(process):
                self._print(f"{on_host(process.name, process.host)}: {_doing(process)}")

    def ready(self, status: LaunchStatus) -> None:
        self._print("ready")
        for label, text in self._summary(status):
            self._console.print(
                Text(f"  {label:<10} {text.replace(CONTINUATION, ' ')}"), soft_wrap=True
            )

    def note(self, text: str) -> None:
        self._print_at(f"{self._wall_clock():%H:%M:%S}", text)

    def close(self) -> None:
        """Do nothing: lines need no clean-up."""

    def _is_news(self, process: ProcessStatus) -> bool:
        """Say whether state or activity are new, or the last percentage is old."""
        said = (process.state, process.doing)
        before, said_at = self._said.get(process.name, (None, 0.0))
        now_at = self._clock()
        if said == before and (process.fraction is None or now_at - said_at < _PERCENT_EVERY_S):
            return False
        self._said[process.name] = (said, now_at)
        return True

    def _print(self, line: str) -> None:
        self._print_at(f"{self._clock() - self._start_at:6.1f} s", line)

    def _print_at(self, time: str, line: str) -> None:
        # A terminal would break a long line within a word; in a file it is for tools to find.
        text = Text(f"[{time}] {safe(line)}")
        self._console.print(text, soft_wrap=not self._console.is_terminal)


class LiveView:
    """Shows a table that follows every process until the deployment is ready or has failed, and
    lines like ``PlainView`` from then on.
    """

    def __init__(self, console: Console, summary: Summary, clock: Callable[[], float]) -> None:
        self._console = console
        self._plain = PlainView(console, summary, clock)
        self._summary = summary
        self._clock = clock
        self._start_at = clock()
        self._status: LaunchStatus | None = None
        self._live: Live | None = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=8,
            transient=True,
            vertical_overflow="crop",
        )
        self._live.start()

    def changed(self, status: LaunchStatus) -> None:
        self._status = status
        if status.phase not in (LaunchPhase.PREPARING, LaunchPhase.STARTING):
            self.close()

    def ready(self, status: LaunchStatus) -> None:
        self.close()
        self._console.print(render_ready(self._summary(status)))

    def note(self, text: str) -> None:
        self._plain.note(text)

    def close(self) -> None:
        """Take the table off the screen and give the cursor back. Safe to call twice."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _render(self) -> RenderableType:
        if self._status is None:
            return Text("")
        return render_status(self._status, self._clock() - self._start_at, *self._console.size)


def make_view(
    console: Console, summary: Summary, clock: Callable[[], float] = time.monotonic
) -> PlainView | LiveView:
    """Return the live table where the terminal can show one, else plain lines."""
    fits = (
        console.is_terminal
        and not console.is_dumb_terminal
        and console.height >= 4
        and console.width >= 20
    )
    return LiveView(console, summary, clock) if fits else PlainView(console, summary, clock)


def render_status(
    status: LaunchStatus, elapsed_s: float, columns: int, rows: int
) -> RenderableType:
    """Render the table, with hosts where there are several. Processes that are not ready come first
    where ``rows`` are too few.
    """
    counts = Counter(process.state for process in status.processes)
    head = Text(
        f"{status.phase} · {elapsed_s:.0f} s · {counts[ProcessState.READY]} of "
        f"{len(status.processes)} ready"
    )
    if status.num_missing_pairs and not counts.keys() - {ProcessState.READY, ProcessState.EXITED}:
        head.append(
            f" · {status.num_missing_pairs} {'pair' if status.num_missing_pairs == 1 else 'pairs'} "
            "to connect"
        )
    head.truncate(columns, overflow="ellipsis")
    room = max(1, rows - 2)
    processes = list(status.processes)
    # `rich` would cut the table at the bottom, where a failing process may stand.
    if len(processes) > room:
        processes = sorted(processes, key=lambda process: process.state is ProcessState.READY)[
            : room - 1
        ]
    names_hosts = len({process.host for process in status.processes}) > 1
    table = Table.grid(padding=(0, 2, 0, 0), expand=False)
    for overflow in ("ellipsis", *(("ellipsis",) if names_hosts else ()), "fold", "ellipsis"):
        table.add_column(no_wrap=True, overflow=overflow)
    for process in processes:
        table.add_row(
            process.name,
            *([safe(process.host)] if names_hosts else []),
            Text(process.state, style=_STYLES[process.state]),
            _progress(process, columns),
        )
    hidden = len(status.processes) - len(processes)
    return Group(head, table, *([Text(f"… and {hidden} more", style="dim")] if hidden else []))


def render_ready(rows: Sequence[tuple[str, str]]) -> RenderableType:
    """Render the panel of a ready deployment, without borders at the sides, so that lines can be
    copied.
    """
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(label, Text(text))
    return Panel(
        grid, title="pdlaunch is ready", border_style="green", box=box.HORIZONTALS, padding=0
    )


def ready_rows(
    status: LaunchStatus, *, model: str, connector: str | None, log_dir: str, needs_key: bool
) -> list[tuple[str, str]]:
    """Return the lines of the panel: URL, a request to try, topology, speeds of pairs, logs."""
    key = f"{CONTINUATION}-H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    # A prompt of one word: a narrow terminal breaks lines at spaces, which JSON allows between its
    # parts alone.
    body = f'{{"model": "{model}", "prompt": "Hello"}}'
    curl = (
        f"curl {status.url}/v1/completions{key}{CONTINUATION}-H 'Content-Type: "
        f"application/json'{CONTINUATION}-d '{body}'"
    )
    return [
        ("URL", status.url),
        ("try", curl),
        ("topology", _topology(status.processes)),
        *(("host", line) for line in _hosts(status.processes)),
        *([("connector", connector)] if connector else []),
        *(("pair", line) for line in _pairs(status)),
        ("logs", log_dir),
        ("stop", "Ctrl-C waits for running requests; a second one does not"),
    ]


def _doing(process: ProcessStatus) -> str:
    percent = "" if process.fraction is None else f" {process.fraction:.0%}"
    return f"{process.state}, {process.doing}{percent}" if process.doing else str(process.state)


def _progress(process: ProcessStatus, columns: int) -> RenderableType:
    if process.fraction is None:
        return Text(process.doing)
    text = Text(f"{process.doing} {process.fraction:.0%}")
    if columns < _BAR_FROM_COLUMNS:
        return text
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_row(ProgressBar(total=1.0, completed=process.fraction, width=16), text)
    return row


def _topology(processes: Sequence[ProcessStatus]) -> str:
    ranks: Counter[str] = Counter()
    engines: dict[str, set[str]] = {role: set() for role in ROLES}
    for process in processes:
        if process.kind == "rank":
            engine = process.name.partition("/")[0]
            role = engine.rpartition("-")[0]
            engines[role].add(engine)
            ranks[role] += 1
    return " + ".join(
        f"{len(names)} {role}"
        + (f" (tp {ranks[role] // len(names)})" if ranks[role] > len(names) else "")
        for role, names in engines.items()
        if names
    )


def _hosts(processes: Sequence[ProcessStatus]) -> list[str]:
    """Return a line for each of up to eight hosts, with what serves there; none for one host."""
    found: dict[str, list[str]] = {}
    for process in processes:
        served = found.setdefault(process.host, [])
        if process.kind != "rank":
            served.append(process.name)
    if len(found) < 2:
        return []
    lines = [f"{host}: {', '.join(names) or 'ranks'}" for host, names in found.items()]
    return lines[:8] + ([f"… and {len(lines) - 8} more hosts"] if len(lines) > 8 else [])


def _pairs(status: LaunchStatus) -> list[str]:
    """Return a line for each of up to four pairs, the slowest first, which deserve a look."""
    pairs = sorted(status.pairs, key=lambda pair: pair.gigabytes_per_s or 0.0)
    lines = [
        f"{pair.peer} → {pair.local}: {pair.path}"
        + (f", {pair.gigabytes_per_s:.1f} GB/s" if pair.gigabytes_per_s is not None else "")
        + "".join(f"; {path}: {said}" for path, said in pair.other_paths.items())
        for pair in pairs[:4]
    ]
    return lines + ([f"… and {len(pairs) - 4} more pairs"] if len(pairs) > 4 else [])
