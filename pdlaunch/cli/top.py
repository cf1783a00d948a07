"""``pdlaunch top`` shows a deployment on the whole screen, as it changes."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.cli.options import ApiKeyOption, UrlArgument
from pdlaunch.cli.output import print_errors
from pdlaunch.cli.status import SORTS, deployment_view
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import read_requests, read_status, reading_api
from pdlaunch.launch.client.api import Api
from pdlaunch.observe.logs import escape_controls
from pdlaunch.protocol.status import DeploymentStatus, RequestSummary

NUM_REQUESTS = 50
READ_TIMEOUT_S = 5.0


def top(
    url: UrlArgument = None,
    api_key: ApiKeyOption = None,
    every: float = typer.Option(1.0, min=0.2, max=3600.0, help="Seconds between two looks."),
) -> None:
    """Watch engines, pairs and the slowest requests; keys sort and pause.

    `pdlaunch status` prints the same once, for pipes.
    """
    console = Console()
    if not (console.is_terminal and sys.stdin.isatty()):
        print_errors(["pdlaunch top needs a terminal; pdlaunch status prints the same once"])
        raise typer.Exit(EXIT_UNUSABLE)
    try:
        api = reading_api(url, api_key, READ_TIMEOUT_S)
        _watch(api, read_status(api), console, every)
    except PdlaunchError as error:
        print_errors([error])
        raise typer.Exit(1) from None
    except EOFError:  # The terminal is gone.
        raise typer.Exit(1) from None


def _watch(api: Api, status: DeploymentStatus, console: Console, every_s: float) -> None:
    """Show and obey keys until one says that it is over."""
    requests: list[RequestSummary] = []
    sort, error, is_paused, read_at = "name", "", False, 0.0
    with (
        _single_keys(sys.stdin.fileno()) as read_keys,
        Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live,
    ):
        while True:
            if not is_paused and time.monotonic() - read_at >= every_s:
                read_at = time.monotonic()
                try:
                    status, error = read_status(api), ""
                    requests = read_requests(api, "slowest", NUM_REQUESTS)
                except PdlaunchError as failed:
                    # The last status stays on the screen.
                    error = str(failed)
            foot = f"q quit  s sort  p pause  (engines by {sort}{', PAUSED' if is_paused else ''})"
            live.update(page(status, requests, sort, error or foot, console), refresh=True)
            # Wait for a key until the next status is due.
            due_s = every_s if is_paused else max(0.0, read_at + every_s - time.monotonic())
            for key in read_keys(due_s):
                if key == "q":
                    return
                if key == "s":
                    names = list(SORTS)
                    sort = names[(names.index(sort) + 1) % len(names)]
                elif key == "p":
                    is_paused, read_at = not is_paused, 0.0


def page(
    status: DeploymentStatus,
    requests: Sequence[RequestSummary],
    sort: str,
    foot: str,
    console: Console,
) -> Group:
    """Return what a screen of the console's size shows."""
    parts = deployment_view(
        status,
        requests,
        sort=sort,
        room=console.height - 1,
        ascii_only=console.options.ascii_only,
    )
    last = Text(escape_controls(foot), style="reverse", no_wrap=True, overflow="crop")
    # The keys come first, where no part that is too long pushes them off the screen.
    return Group(last, *parts)


@contextlib.contextmanager
def _single_keys(descriptor: int) -> Iterator[Callable[[float], str]]:
    """Have the terminal give keys at once, and not show them, while the block runs; yields what
    waits for keys. Ctrl-C still interrupts.
    """
    # Imported here: systems without it can still list commands.
    import termios
    import tty

    def read_keys(timeout_s: float) -> str:
        if not select.select([descriptor], [], [], timeout_s)[0]:
            return ""
        read = os.read(descriptor, 1024)
        if not read:
            raise EOFError("the terminal is gone")
        return read.decode("latin-1")

    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield read_keys
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
