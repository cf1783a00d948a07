"""``pdlaunch scale`` and ``role`` change the number of engines, or the role of one, while the
deployment serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdlaunch.cli.engines import KeyOption, UrlOption
from pdlaunch.cli.output import print_errors
from pdlaunch.config.roles import ROLES, Role
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import admin_api
from pdlaunch.launch.client.changes import Change, ChangeOutcome, scale_engines, turn_engine

DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be started and stopped; do nothing.")
]
DrainOption = Annotated[
    float | None,
    typer.Option(
        "--drain-timeout",
        min=0,
        max=800,
        help="What runs at an engine that stops gets so long, then it goes on at another one; "
        "drain_timeout_s of the launch without it.",
        metavar="SECONDS",
    ),
]


def scale(
    wanted: Annotated[
        list[str],
        typer.Argument(
            help="Engines of a role: prefill=2 decode=1; roles that are not named keep theirs.",
            metavar="ROLE=NUMBER",
        ),
    ],
    url: UrlOption = None,
    dry_run: DryRunOption = False,
    drain_timeout: DrainOption = None,
    admin_api_key: KeyOption = None,
) -> None:
    """Add and remove engines of a running launch. New ones get requests once their pairs are
    proven; those that go get none any more and finish what runs.
    """
    replicas = _replicas(wanted)
    _do(
        lambda: scale_engines(
            admin_api(url, admin_api_key),
            replicas,
            dry_run=dry_run,
            drain_timeout_s=drain_timeout,
        ),
        dry_run=dry_run,
    )


def role(
    name: Annotated[str, typer.Argument(help="The engine: decode-1.", metavar="NAME")],
    role: Annotated[Role, typer.Argument(help="The role that it is to have.", metavar="ROLE")],
    url: UrlOption = None,
    dry_run: DryRunOption = False,
    drain_timeout: DrainOption = None,
    admin_api_key: KeyOption = None,
) -> None:
    """Give an engine of a running launch another role: it finishes what runs, stops, and a new one
    of that role starts on its devices, under a name of that role.
    """
    _do(
        lambda: turn_engine(
            admin_api(url, admin_api_key),
            name,
            role,
            dry_run=dry_run,
            drain_timeout_s=drain_timeout,
        ),
        dry_run=dry_run,
    )


def _replicas(wanted: list[str]) -> dict[Role, int]:
    replicas: dict[Role, int] = {}
    for text in wanted:
        name, _, number = text.partition("=")
        known = next((role for role in get_args(Role) if role == name), None)
        if known is None or not number.isdecimal() or known in replicas:
            raise typer.BadParameter(
                f"{text[:80]!a}: write ROLE=NUMBER, each role of {', '.join(ROLES)} at most once",
                param_hint="ROLE=NUMBER",
            )
        replicas[known] = int(number)
    return replicas


def _do(call: Callable[[], ChangeOutcome], *, dry_run: bool) -> None:
    try:
        outcome = call()
    except KeyboardInterrupt:
        if not dry_run:
            text = "what has begun goes on; `pdlaunch status` shows the engines"
            Console(stderr=True).print(Text(text), soft_wrap=True)
        raise
    except PdlaunchError as error:
        print_errors([error])
        raise typer.Exit(1) from None
    console = Console()
    if outcome.change is not None:
        _show(console, outcome.change, "would be" if dry_run or outcome.error else "is")
    for note in outcome.notes:
        console.print(Text(note, style="yellow"), soft_wrap=True)
    if outcome.error:
        console.print(Text(outcome.error, style="red"), soft_wrap=True)
        raise typer.Exit(1)


def _show(console: Console, change: Change, verb: str) -> None:
    """Print a row for each engine that starts or stops, and what there is afterwards."""
    table = Table("engine", "", "host", "devices", "threads", "running")
    for engine in change.starts:
        table.add_row(
            Text(engine.name),
            "starts",
            Text(engine.host),
            Text(" ".join(engine.devices)),
            str(engine.num_threads),
            "",
        )
    for name, number in change.stops.items():
        table.add_row(Text(name), "stops", "", "", "", str(number))
    if change.starts or change.stops:
        console.print(table)
    if change.stops:
        first = "before others start" if change.stops_first else "last"
        console.print(
            f"What stops does so {first}; what runs there gets up to {change.drain_s:g} s, then it "
            "goes on elsewhere.",
            soft_wrap=True,
        )
    counts = ", ".join(f"{change.replicas[role]} {role}" for role in ROLES if change.replicas[role])
    console.print(f"The launch {verb} {counts}.", soft_wrap=True)
