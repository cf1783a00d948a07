"""Runs a command of pdlaunch in this process.

Each command is built once: to build it anew, with the validators of its flags, takes longer than
most commands run.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import typer.main
import typer.testing

from pdlaunch.cli.app import build_app

_HELP = {"-h", "--help"}


def invoke(
    arguments: Sequence[str], env: Mapping[str, str | None] | None = None
) -> typer.testing.Result:
    """Run ``pdlaunch`` with these arguments; ``env`` joins the environment."""
    called = next((word for word in arguments if not word.startswith("-")), "")
    # Help in few columns changes the command that it describes.
    build = _command.__wrapped__ if _HELP & {*arguments} else _command
    command = build(called)
    runner = typer.testing.CliRunner()
    with patch.object(typer.testing, "_get_command", lambda app: command):
        return runner.invoke(typer.Typer(), arguments, env=env)


@functools.lru_cache(maxsize=32)
def _command(called: str) -> Any:
    return typer.main.get_command(build_app([called]))
