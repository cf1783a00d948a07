"""``pdlaunch restart``: engines of a running deployment are started anew."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.cli.bench_output import print_errors
from pdlaunch.cli.sleep import KeyOption, UrlOption
from pdlaunch.client.admin import admin_api
from pdlaunch.client.restart import restart_engine
from pdlaunch.errors import PdlaunchError


def restart(
    name: Annotated[
        list[str],
        typer.Argument(help="An engine, or one of its processes: decode-0, decode-0/rank-1."),
    ],
    url: UrlOption = None,
    admin_api_key: KeyOption = None,
) -> None:
    """Engines finish what runs, stop and start anew, one after the other; one that was given up
    starts at once.
    """
    console = Console()
    failed = False
    try:
        admin = admin_api(url, admin_api_key)
        for each in dict.fromkeys(name):
            outcome = restart_engine(admin, each)
            if outcome.error is None:
                console.print(Text(f"{outcome.engine} serves again"), soft_wrap=True)
            else:
                failed = True
                console.print(
                    Text(f"{outcome.engine}: {outcome.error}", style="red"), soft_wrap=True
                )
    except PdlaunchError as error:
        print_errors([error])
        raise typer.Exit(1) from None
    if failed:
        raise typer.Exit(1)
