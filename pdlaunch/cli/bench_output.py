"""How the figures of ``pdlaunch bench`` are asked for and printed: tables for people, JSON for
programs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pdlaunch.errors import ConfigError, PdlaunchError

_ENOUGH = 10_000
"""Characters in which any table fits."""


class Format(StrEnum):
    """How the figures are printed."""

    TABLE = "table"
    JSON = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="How the figures are printed.")]


def print_json(found: object) -> None:
    """Structs as objects; what is not a number is null."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(found)).decode() + "\n")


def print_table(
    rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str], console: Console | None = None
) -> None:
    """``headings``: the columns by field. Where they do not fit next to each other on a terminal,
    each row is told in words.
    """
    console = console or Console()
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in headings.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(_short(row[field]) for field in headings))
    width = console.measure(table, options=console.options.update(max_width=_ENOUGH)).maximum
    if not console.is_terminal:
        console.width = max(console.width, width)
    if width <= console.width:
        console.print(table)
        return
    for row in rows:
        figures = (
            f"{' '.join(heading.split())} {_short(row[field])}"
            for field, heading in headings.items()
        )
        console.print(", ".join(figures), markup=False, highlight=False)


def print_errors(errors: Sequence[str | PdlaunchError]) -> None:
    """On stderr; with the fix where an error knows one."""
    console = Console(stderr=True)
    for error in errors:
        console.print(
            f"error: {error}{_fix(error)}",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _fix(error: str | PdlaunchError) -> str:
    """Those of a whole configuration stand in the message."""
    return (
        f"\nfix: {error.fix}"
        if isinstance(error, ConfigError) and error.fix and error.fix not in str(error)
        else ""
    )


def _short(value: object) -> str:
    """Numbers to three digits or more: 0.95, -53.1, 4330."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return (
        f"{value:.0f}"
        if abs(value) >= 1000
        else f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.2f}"
    )
