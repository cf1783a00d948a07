"""``pdlaunch config show``: print the resolved values."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdlaunch.cli.flags import ServeCommand, with_serve_flags
from pdlaunch.cli.output import FormatOption, ending_at_errors, safe
from pdlaunch.cli.preflight import AssumeOption, judged_machine
from pdlaunch.config.sources import ShownValue, load_config, shown_values
from pdlaunch.planning.effective import effective_settings
from pdlaunch.planning.hosts import planned_hosts
from pdlaunch.planning.resolve import resolve_on

app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})


@app.command("show", cls=ServeCommand)
@with_serve_flags
def show(
    config: Path | None = None,
    output: FormatOption = "table",
    assume: AssumeOption = None,
    *,
    flags: dict[str, object],
) -> None:
    """Print every setting, its value, and where it comes from: flag, environment, file, default or
    derived.
    """
    with ending_at_errors():
        loaded = load_config(config, os.environ, flags)
        judged = judged_machine(assume, loaded.config)
        hosts = planned_hosts(loaded.config, judged.machine, judged.environ)
    resolved = resolve_on(loaded.config, hosts, judged.environ)
    values = {item.path: item for item in shown_values(loaded)}
    values |= {item.path: item for item in effective_settings(resolved)}
    if output == "json":
        typer.echo(json.dumps({item.path: _entry(item) for item in values.values()}, indent=2))
    else:
        _print_values(Console(), values.values())


def _entry(item: ShownValue) -> dict[str, object]:
    return {"value": item.value, "origin": item.origin.kind, "detail": item.origin.detail}


def _print_values(console: Console, values: Iterable[ShownValue]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("setting", "value", "origin"):
        table.add_column(heading, overflow="fold")
    for item in values:
        kind, detail = item.origin.kind, item.origin.detail
        cells = (
            json.dumps(item.value, ensure_ascii=False),
            f"{kind} ({detail})" if detail else kind,
        )
        style = "dim" if kind == "default" else ""
        table.add_row(item.path, *(Text(safe(cell)) for cell in cells), style=style)
    console.print(table)
