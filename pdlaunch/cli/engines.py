"""``pdlaunch sleep``, ``wake`` and ``restart`` command the engines of a running deployment."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdlaunch.cli.output import print_errors, safe
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import admin_api
from pdlaunch.launch.client.commands import (
    SleepOutcome,
    restart_engine,
    sleep_engines,
    wake_engines,
)

GIB = 1024**3


class Tag(StrEnum):
    """Names a pool that can wake up by itself; typer takes no list of a ``Literal``."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"


UrlOption = Annotated[
    str | None,
    typer.Option(
        help="The deployment's router; needed where several of yours run, or another's.",
        envvar="PDLAUNCH_URL",
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        help="Its admin_api_key; not needed for your own on this machine.",
        envvar="PDLAUNCH_ADMIN_API_KEY",
        metavar="KEY",
    ),
]
EngineOption = Annotated[
    list[str] | None,
    typer.Option("--engine", help="Only this engine; may be repeated.", metavar="NAME"),
]


def sleep(
    url: UrlOption = None,
    level: Annotated[
        int,
        typer.Option(
            min=1,
            max=2,
            help="1 keeps the weights in host memory; 2 drops them, they are loaded again.",
        ),
    ] = 1,
    mode: Annotated[
        Literal["wait", "refuse"],
        typer.Option(help="While requests run or KV blocks are leased: wait for them, or refuse."),
    ] = "wait",
    engine: EngineOption = None,
    admin_api_key: KeyOption = None,
) -> None:
    """Have engines give their device memory back; they serve nothing until `pdlaunch wake`. Needs
    enable_sleep_mode.
    """
    _show(
        "given back",
        lambda: sleep_engines(
            admin_api(url, admin_api_key), level=level, mode=mode, names=engine or ()
        ),
    )


def wake(
    url: UrlOption = None,
    tag: Annotated[
        list[Tag] | None,
        typer.Option("--tag", help="Only this pool; may be repeated."),
    ] = None,
    engine: EngineOption = None,
    admin_api_key: KeyOption = None,
) -> None:
    """Have engines that sleep take their device memory again and serve."""
    _show(
        "taken",
        lambda: wake_engines(
            admin_api(url, admin_api_key),
            tags=[str(name) for name in tag or ()],
            names=engine or (),
        ),
    )


def restart(
    name: Annotated[
        list[str],
        typer.Argument(help="An engine, or one of its processes: decode-0, decode-0/rank-1."),
    ],
    url: UrlOption = None,
    admin_api_key: KeyOption = None,
) -> None:
    """Have engines finish what runs, stop and start anew, one after the other; one that was given
    up starts at once.
    """
    console = Console()
    failed = False
    try:
        admin = admin_api(url, admin_api_key)
        # One after the other, so that the others of a role serve meanwhile.
        for each in dict.fromkeys(name):
            outcome = restart_engine(admin, each)
            if outcome.error is None:
                console.print(Text(f"{outcome.engine} serves again"), soft_wrap=True)
            else:
                failed = True
                console.print(
                    Text(safe(f"{outcome.engine}: {outcome.error}"), style="red"), soft_wrap=True
                )
    except PdlaunchError as error:
        print_errors([error])
        raise typer.Exit(1) from None
    if failed:
        raise typer.Exit(1)


def _show(what: str, call: Callable[[], list[SleepOutcome]]) -> None:
    """Print one row for each engine. The exit code is 1 when one of them has refused."""
    try:
        outcomes = call()
    except PdlaunchError as error:
        print_errors([error])
        raise typer.Exit(1) from None
    table = Table("engine", "state", what)
    for outcome in outcomes:
        state = (
            Text(safe(outcome.error), style="red")
            if outcome.error
            else Text("sleeping" if outcome.is_sleeping else "awake")
        )
        table.add_row(
            Text(outcome.engine),
            state,
            "" if outcome.error else f"{outcome.num_bytes / GIB:.2f} GiB",
        )
    Console().print(table)
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(1)
