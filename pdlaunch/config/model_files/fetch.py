"""Bring files of a model of the hub here, in a process of their own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from pdlaunch.config.model_files.hub import Part, cached_snapshot, is_offline
from pdlaunch.config.model_files.weights import weight_files
from pdlaunch.errors import ConfigError

ReportBytes = Callable[[int, int], None]
"""Is told how many bytes are here, and of how many."""
Fetch = Callable[[str, str | None, Part], None]
"""Brings a part of a model (name, revision) into the cache. Raises ConfigError."""

_STOP_TIMEOUT_S = 10.0


def fetch_part(
    name: str, revision: str | None, part: Part, report: ReportBytes | None = None
) -> None:
    """Download what the cache lacks of a part of a model; ends at once on Ctrl-C.

    The hub is asked for a newer version of the description, unless HF_HUB_OFFLINE forbids it.
    Weights that are complete are not asked for. Raises ConfigError.
    """
    if is_offline():
        # What is missing is found where it is read.
        return
    if part == "weights" and _has_weights(name, revision):
        return
    revision = revision or "main"
    with _running(name, revision, part) as process:
        last = ""
        for line in process.stdout or ():
            match _read(line):
                case {"done": int(done), "total": int(total)}:
                    if report is not None:
                        report(done, total)
                case {"error": str(text), "fix": fix, "field": field}:
                    value = revision if field == "revision" else name
                    raise ConfigError(text, field=field, value=value, fix=fix)
                case _:
                    last = line.strip() or last
        if process.wait() != 0:
            raise ConfigError(
                f"{name} was not downloaded: the process ended with code {process.returncode}: "
                f"{last}",
                field="model",
                value=name,
                fix="Try again.",
            )


def _has_weights(name: str, revision: str | None) -> bool:
    try:
        weight_files(cached_snapshot(name, revision))
    except ConfigError:
        return False
    return True


@contextlib.contextmanager
def _running(name: str, revision: str, part: Part) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-P", "-m", "pdlaunch.protocol.process.guarded"]
    process = subprocess.Popen(
        [*command, "pdlaunch.config.model_files.download", name, revision, part],
        # Its end tells the process that we are gone.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Ctrl-C is for us, who stop it.
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _read(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
