"""Logs one line for each record, to standard error or a file, with the request it belongs to."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]
# An ``extra`` of log records: a function that returns further fields for JSON.
FIELDS = "fields"

_current_request: ContextVar[str] = ContextVar("pdlaunch_request", default="")

# Control characters, marks that turn the direction of writing, and separators of lines.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str) -> str:
    """Return ``text`` on one line, without anything that a terminal would obey."""
    if text.isprintable():  # As nearly all texts are; the search takes twice as long.
        return text
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


class _Formatter(logging.Formatter):
    """Writes a JSON object a line, or
    ``2026-01-31T12:00:00.123Z INFO prefill-0 pdlaunch.router.app [request-id] text``.
    """

    def __init__(self, process: str, form: LogFormat) -> None:
        super().__init__()
        self._process = process
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        second = datetime.fromtimestamp(int(record.created), UTC).strftime("%Y-%m-%dT%H:%M:%S")
        time, request_id = f"{second}.{int(record.msecs):03d}Z", _current_request.get()
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._form == "text":
            place = f"{record.name} [{request_id}]" if request_id else record.name
            line = f"{time} {record.levelname} {self._process} {place} {record.getMessage()}"
            return "\n".join(map(escape_controls, [line, *trace.split("\n")] if trace else [line]))
        fields = {
            "time": time,
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id,
            "exception": trace,
        }
        known = {name: value for name, value in fields.items() if value or name == "message"}
        return json.dumps(known | getattr(record, FIELDS, dict)())


def setup_logging(
    process: str,
    level: str,
    *,
    form: LogFormat = "text",
    file: Path | None = None,
    stream: TextIO | None = None,
) -> logging.Handler:
    """Send all records of this process to ``file``, else ``stream``, else standard error.

    ``level``: of pdlaunch's own loggers; libraries speak from warning on.
    """
    handler = (
        logging.StreamHandler(stream or sys.stderr)
        if file is None
        else logging.FileHandler(file, encoding="utf-8")
    )
    handler.setFormatter(_Formatter(process, form))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("pdlaunch").setLevel(level.upper())
    logging.captureWarnings(True)
    # A full disk loses lines, and must not fill the terminal instead.
    logging.raiseExceptions = False
    # Nothing shows place in the source, thread or process id; a line takes a third less without.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    return handler


@contextlib.contextmanager
def request_logging(request_id: str) -> Iterator[None]:
    """Mark records made inside, also by awaited coroutines, with ``request_id``."""
    token = _current_request.set(request_id)
    try:
        yield
    finally:
        _current_request.reset(token)
