"""Prints for all commands: tables for people, JSON for programs, errors on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdlaunch.errors import ConfigError, PdlaunchError
from pdlaunch.observe.logs import escape_controls

_ENOUGH = 10_000
"""A width in characters that fits any table."""

Format = Literal["table", "json"]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print what was found.")]


def safe(text: str) -> str:
    """Escape lone surrogates and control characters, which a terminal would obey or not take.

    Names of clients, and what other servers answer, may hold anything.
    """
    shown = (char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
    return "".join(shown)


def print_json(found: object) -> None:
    """Print structs as objects, and numbers that are not finite as null."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(found)).decode() + "\n")


def print_table(
    rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str], console: Console | None = None
) -> None:
    """Print a table whose columns are ``headings``, by field.

    Each row becomes a line of words on a terminal that is too narrow for the table.
    """
    console = console or Console()
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in headings.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_short(row[field])) for field in headings))
    width = console.measure(table, options=console.options.update(max_width=_ENOUGH)).maximum
    # A pipe has no width: its reader gets the table whole.
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
    """Print errors to stderr, each with its fix where it knows one."""
    console = Console(stderr=True)
    for error in errors:
        console.print(
            safe(f"error: {error}{_fix(error)}"),
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _fix(error: str | PdlaunchError) -> str:
    """Return the line with the fix, unless the message holds it already."""
    return (
        f"\nfix: {error.fix}"
        if isinstance(error, ConfigError) and error.fix and error.fix not in str(error)
        else ""
    )


def _short(value: object) -> str:
    """Write numbers with three digits or more: 0.95, -53.1, 4330."""
    if not isinstance(value, float):
        return "-" if value is None else escape_controls(str(value))
    return (
        f"{value:.0f}"
        if abs(value) >= 1000
        else f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.2f}"
    )
