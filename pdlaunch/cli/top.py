"""``pdlaunch top`` shows a deployment on the whole screen, as it changes."""

from __future__ import annotations

import time

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.cli.options import ApiKeyOption, UrlOption
from pdlaunch.cli.output import ending_at_errors, print_errors
from pdlaunch.cli.status import deployment_view
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import read_status, reading_api
from pdlaunch.launch.client.api import Api
from pdlaunch.observe.logs import escape_controls
from pdlaunch.protocol.status import DeploymentStatus

READ_TIMEOUT_S = 5.0


def top(
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    every: float = typer.Option(1.0, min=0.2, max=3600.0, help="Seconds between two looks."),
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
    """Show the deployment for ever; while it does not answer, its last status and the error."""
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            head = "Ctrl-C ends"
            try:
                status = read_status(api)
            except PdlaunchError as error:
                head = str(error)
            live.update(page(status, head, console.height), refresh=True)
            time.sleep(every_s)


def page(status: DeploymentStatus, head: str, num_lines: int) -> Group:
    """Return what a screen of this height shows."""
    first = Text(escape_controls(head), style="reverse", no_wrap=True, overflow="crop")
    return Group(first, *deployment_view(status, num_lines - 1))
