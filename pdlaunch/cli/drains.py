"""``pdlaunch drain`` and ``undrain`` keep new work from engines of a running deployment for a
while.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.cli.engines import KeyOption, UrlOption
from pdlaunch.cli.output import print_errors
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import admin_api
from pdlaunch.launch.client.changes import DrainOutcome, drain_engines, undrain_engines

MAX_TIMEOUT_S = 850.0
"""Shorter than a command may take."""

NamesArgument = Annotated[
    list[str],
    typer.Argument(help="An engine, or one of its processes: decode-0.", metavar="NAME"),
]


def drain(
    name: NamesArgument,
    url: UrlOption = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=0,
            max=MAX_TIMEOUT_S,
            help="Wait so long for what runs; it goes on in any case. 0 does not wait.",
            metavar="SECONDS",
        ),
    ] = 600.0,
    admin_api_key: KeyOption = None,
) -> None:
    """Give engines no new work, and wait until nothing runs there; nothing is moved by force. It
    holds until `pdlaunch undrain`, also while the engine is restarted.
    """
    try:
        outcomes = _ask(
            lambda: drain_engines(admin_api(url, admin_api_key), name, timeout_s=timeout)
        )
    except KeyboardInterrupt:
        names = " ".join(name)
        Console(stderr=True).print(
            Text(f"{names}: no new work; `pdlaunch undrain {names}` ends that"), soft_wrap=True
        )
        raise
    _show(outcomes, "is given no new work", timeout)


def undrain(name: NamesArgument, url: UrlOption = None, admin_api_key: KeyOption = None) -> None:
    """Give engines work again that `pdlaunch drain` has kept it from."""
    _show(_ask(lambda: undrain_engines(admin_api(url, admin_api_key), name)), "is given work")


def _ask(call: Callable[[], list[DrainOutcome]]) -> list[DrainOutcome]:
    try:
        return call()
    except PdlaunchError as error:
        print_errors([error])
        raise typer.Exit(1) from None


def _show(outcomes: list[DrainOutcome], what: str, timeout_s: float | None = None) -> None:
    """Print a line for each engine. The exit code is 1 when one was refused, or work was waited
    for that still runs.
    """
    console = Console()
    for outcome in outcomes:
        line = Text(f"{outcome.engine} {what}")
        if outcome.error is not None:
            line = Text(f"{outcome.engine}: {outcome.error}", style="red")
        elif outcome.running:
            line.append(f"; {outcome.running} still at work after {timeout_s:g} s")
        elif timeout_s is not None:
            line.append("; nothing runs there")
        console.print(line, soft_wrap=True)
        for note in outcome.notes:
            console.print(Text(f"  {note}", style="yellow"), soft_wrap=True)
    if any(each.error is not None or (timeout_s and each.running) for each in outcomes):
        raise typer.Exit(1)
