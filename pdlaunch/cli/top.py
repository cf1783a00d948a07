"""``pdlaunch top`` shows a deployment on the whole screen, as it changes."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.cli.keys import read_keys, single_keys
from pdlaunch.cli.output import print_errors
from pdlaunch.cli.status import ApiKeyOption, UrlArgument
from pdlaunch.cli.top_view import Screen, Snapshot, lay_out, shown_requests
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.requests import read_requests, read_status, read_trace, reading_api

NUM_REQUESTS = 50
READ_TIMEOUT_S = 5.0
_KEY_WAIT_S = 0.1


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
                self.snapshot = Snapshot(
                    read_status(self._api), read_requests(self._api, "slowest", NUM_REQUESTS)
                )
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
        watch(poller, api, console)
    except EOFError:
        raise typer.Exit(1) from None
    finally:
        poller.stop()


def watch(poller: Poller, api: Api, console: Console) -> None:
    """Show and obey keys until one says that it is over."""
    screen, shown, drawn = Screen(), poller.snapshot, None
    ascii_only = not console.encoding.lower().startswith("utf")
    descriptor = sys.stdin.fileno()
    with (
        single_keys(descriptor),
        Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live,
    ):
        while not screen.is_over:
            if not screen.paused:
                shown = poller.snapshot
            state = (shown, screen, console.size)
            if state != drawn:
                lines = lay_out(shown, screen, *console.size, ascii_only=ascii_only)
                live.update(Text("\n").join(lines), refresh=True)
                drawn = state
            requests = shown_requests(shown.requests)
            for key in read_keys(descriptor, _KEY_WAIT_S):
                screen = screen.press(key, len(requests))
            if screen.wants_trace:
                screen, shown = _open_trace(screen, shown, api)


def _open_trace(screen: Screen, shown: Snapshot, api: Api) -> tuple[Screen, Snapshot]:
    requests = shown_requests(shown.requests)
    screen = replace(screen, wants_trace=False)
    try:
        chosen = requests[min(screen.chosen, len(requests) - 1)]
        return replace(screen, trace=read_trace(api, chosen.id)), shown
    except PdlaunchError as error:
        return screen, replace(shown, error=str(error))
