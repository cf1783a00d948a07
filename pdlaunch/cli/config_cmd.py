"""``pdlaunch config``: the JSON schema of the file, and the resolved values with their origins."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdlaunch.cli.findings import safe
from pdlaunch.cli.flags import ConfigArgument, with_serve_flags
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.shown import ShownValue, shown_values
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError

EXIT_UNUSABLE = 2

app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})


class Format(StrEnum):
    """How the values are printed."""

    TABLE = "table"
    JSON = "json"


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of the configuration file; editors check YAML with it."""
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **LaunchConfig.model_json_schema(),
        "title": "pdlaunch configuration",
    }
    typer.echo(json.dumps(document, indent=2))


@app.command("show")
@with_serve_flags
def show(
    config: ConfigArgument = None,
    output: Annotated[
        Format, typer.Option("--format", help="How the values are printed.")
    ] = Format.TABLE,
    *,
    flags: dict[str, object],
) -> None:
    """Print every setting, its value, and where it comes from: flag, environment, file, default or
    derived.
    """
    try:
        values = shown_values(load_config(config, os.environ, flags))
    except ConfigError as error:
        Console(file=sys.stderr, soft_wrap=True).print(
            Text(f"error: {safe(str(error))}", style="red")
        )
        raise typer.Exit(EXIT_UNUSABLE) from None
    if output is Format.JSON:
        typer.echo(json.dumps({item.path: _entry(item) for item in values}, indent=2))
    else:
        _print_table(Console(), values)


def _entry(item: ShownValue) -> dict[str, object]:
    return {"value": item.value, "origin": item.origin.kind, "detail": item.origin.detail}


def _print_table(console: Console, values: list[ShownValue]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("setting", "value", "origin"):
        table.add_column(heading, overflow="fold")
    for item in values:
        origin = (
            f"{item.origin.kind} ({item.origin.detail})" if item.origin.detail else item.origin.kind
        )
        style = "dim" if item.origin.kind == "default" else ""
        table.add_row(
            item.path,
            Text(safe(json.dumps(item.value, ensure_ascii=False))),
            Text(safe(origin)),
            style=style,
        )
    console.print(table)
