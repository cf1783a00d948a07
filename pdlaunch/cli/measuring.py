"""Modules that measure run in processes of their own: torch stays out of the command's, which they
do not outlive.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import typer

STDERR = 2
"""File descriptor."""


def run_module(
    module: str,
    *arguments: str,
    environ: Mapping[str, str] | None = None,
    stdout: int = subprocess.PIPE,
) -> bytes:
    """Return what ``python -m MODULE ARGUMENTS`` writes to the pipe; its errors are on stderr.

    Raises ``typer.Exit`` when it fails.
    """
    # -P: a folder named pdlaunch where the user stands is not the installed one.
    command = [sys.executable, "-P", "-m", "pdlaunch.process.guarded", module, *arguments]
    # A session of its own: Ctrl-C ends this process, which then ends that one, without a word of
    # its own.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=stdout,
        env=os.environ | (environ or {}),
        start_new_session=True,
    ) as process:
        # Standard input stays open: its end is the end of the process.
        found = b"" if process.stdout is None else process.stdout.read()
        if process.wait() != 0:
            raise typer.Exit(1)
    return found
