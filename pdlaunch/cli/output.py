"""Prints for all commands: tables for people, JSON for programs, errors on stderr."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pdlaunch.cli import EXIT_FAILED, EXIT_UNUSABLE
from pdlaunch.errors import ConfigError, PdlaunchError
from pdlaunch.observe.logs import escape_controls

_ENOUGH = 10_000  # a width in characters that fits any table

Format = Literal["table", "json"]
FormatOption = Annotated[Format, typer.Option("--format", help="Format of the output.")]


def safe(text: str) -> str:
    """Escape surrogates and control characters, which a terminal would obey, except newlines. Names
    of clients and answers of other servers may have any.
    """
    shown = (char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
    return "".join(shown)


def print_json(found: object) -> None:
    """Print structs as objects, and numbers that are not finite as null."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(found)).decode() + "\n")


def make_table(
    rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str], room: int | None = None
) -> Table:
    """Make a table. ``headings``: field of a row -> heading. A row may have a field ``style``.
    ``room``: the most lines; the last one then says how many rows are left out.
    """
    table = Table(
        box=None if room else SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    for name, heading in headings.items():
        is_text = bool(rows) and isinstance(rows[0][name], str)
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
    num_left_out = 0 if room is None or len(rows) < room else len(rows) - max(0, room - 2)
    for row in rows[: len(rows) - num_left_out]:
        table.add_row(*(Text(_short(row[name])) for name in headings), style=row.get("style"))
    if num_left_out:
        table.add_row(Text(f"... and {num_left_out} more"))
    return table


def print_table(rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str]) -> None:
    """Print a table; on a terminal too narrow for it, print each row as a line of text."""
    console, table = Console(), make_table(rows, headings)
    width = console.measure(table, options=console.options.update(max_width=_ENOUGH)).maximum
    # Into a pipe, the table is printed at its full width.
    if not console.is_terminal:
        console.width = max(console.width, width)
    if width <= console.width:
        console.print(table)
        return
    for row in rows:
        cells = (f"{' '.join(text.split())} {_short(row[name])}" for name, text in headings.items())
        console.print(", ".join(cells), markup=False, highlight=False)


def print_errors(errors: Sequence[str | PdlaunchError]) -> None:
    """Print errors to stderr; for an unusable setting, also its field, value and fix."""
    for error in errors:
        say(f"error: {error}", "red")
        # The text of an error with several problems already has their fields, values and fixes.
        names = () if getattr(error, "problems", ()) else ("field", "value", "fix")
        for name in names:
            if (found := getattr(error, name, None)) is not None:
                say(f"  {name}: {found}")


def say(text: str, style: str = "") -> None:
    """Print a line to stderr."""
    print_line(text, style, Console(stderr=True))


def print_line(text: str, style: str = "", console: Console | None = None) -> None:
    """Print a line: wrapped between words on a terminal, unwrapped in a file."""
    console = console or Console()
    console.print(Text(safe(text), style=style), soft_wrap=not console.is_terminal)


def counted(number: int, noun: str) -> str:
    """Write ``1 request``, ``2 requests``, ``0 requests``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def fitting(
    rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str], width: int, spare: Sequence[str]
) -> dict[str, str]:
    """Return the columns that fit into ``width``. The first of ``spare`` are dropped first."""
    shown, options = dict(headings), Console(width=_ENOUGH).options
    for name in spare:
        if Measurement.get(Console(), options, make_table(rows, shown)).maximum <= width:
            break
        shown.pop(name, None)
    return shown


@contextlib.contextmanager
def ending_at_errors() -> Iterator[None]:
    """End the command at an unusable setting (exit code 2) or another error (exit code 1)."""
    try:
        yield
    except PdlaunchError as error:
        print_errors([error])
        code = EXIT_UNUSABLE if isinstance(error, ConfigError) else EXIT_FAILED
        raise typer.Exit(code) from None


def _short(value: object) -> str:
    """Write a float with at least three digits: 0.95, -53.1, 4330."""
    if not isinstance(value, float):
        return "-" if value is None else escape_controls(str(value))
    return f"{value:.{0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2}f}"
