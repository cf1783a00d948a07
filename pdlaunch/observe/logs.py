"""Logs one line for each record, to standard error or a file, with the request it belongs to."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

_current_request: ContextVar[str] = ContextVar("pdlaunch_request", default="")


class _LineFormatter(logging.Formatter):
    """Writes ``2026-01-31T12:00:00.123Z INFO prefill-0 pdlaunch.server.app [request-id] text``."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        time = (
            datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z")
        )
        request_id = _current_request.get()
        place = f"{record.name} [{request_id}]" if request_id else record.name
        line = f"{time} {record.levelname} {self._process} {place} {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _LogFile(logging.FileHandler):
    """Loses the lines that a full disk does not take, and says so once on standard error."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, encoding="utf-8")
        self._has_complained = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging calls
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_complained:
            self._has_complained = True
            sys.stderr.write(
                f"log lines are lost: {self.baseFilename} cannot be written: "
                f"{error.strerror or error}\n"
            )


def setup_logging(
    process: str, level: str, *, file: Path | None = None, stream: TextIO | None = None
) -> logging.Handler:
    """Send all records of this process to ``file``, else ``stream``, else standard error; replaces
    earlier handlers.

    ``level``: debug, info, warning or error, of pdlaunch's own loggers; libraries speak from
    warning on.
    """
    handler = logging.StreamHandler(stream or sys.stderr) if file is None else _LogFile(file)
    handler.setFormatter(_LineFormatter(process))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("pdlaunch").setLevel(level.upper())
    logging.captureWarnings(True)
    return handler


@contextlib.contextmanager
def request_logging(request_id: str) -> Iterator[None]:
    """Mark records made inside, also by awaited coroutines, with ``request_id``."""
    token = _current_request.set(request_id)
    try:
        yield
    finally:
        _current_request.reset(token)
