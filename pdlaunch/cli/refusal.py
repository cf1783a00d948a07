"""Refuses a setting that cannot be used."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.errors import ConfigError


def refuse(errors: Console, error: ConfigError) -> NoReturn:
    """Print field, value and fix of a setting that cannot be used, and exit with code 2."""
    errors.print(Text(f"error: {error}", style="red"))
    problems = getattr(error, "problems", ())
    if not problems:
        if error.field is not None:
            errors.print(Text(f"  field: {error.field}"))
        if error.value is not None:
            errors.print(Text(f"  value: {error.value}"))
        if error.fix is not None:
            errors.print(Text(f"  fix: {error.fix}"))
    raise typer.Exit(EXIT_UNUSABLE) from None
