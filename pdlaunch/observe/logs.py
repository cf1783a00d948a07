"""Writes log records to standard error or a file, one line each, with the id of their request."""

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
# Key of ``extra`` in logging calls: a function that returns further fields for JSON records.
FIELDS = "fields"

_current_request: ContextVar[str] = ContextVar("pdlaunch_request", default="")

# Control characters, marks that change the writing direction, line separators and surrogates.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str) -> str:
    """Return ``text`` with control characters escaped: one line, safe to print on a terminal."""
    if text.isprintable():  # Nearly all texts are printable; the search takes twice as long.
        return text
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


class _Formatter(logging.Formatter):
    """Formats a record as a JSON object on one line, or as text:
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
    """Send all records of this process to ``file``, else ``stream``, else standard error."""
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
    root.setLevel(logging.WARNING)  # for libraries
    logging.getLogger("pdlaunch").setLevel(level.upper())
    logging.captureWarnings(True)
    # If the disk is full, lines are lost; logging must not print a traceback for each of them.
    logging.raiseExceptions = False
    # No format shows source line, thread or process id; a record costs a third less without them.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    return handler


@contextlib.contextmanager
def request_logging(request_id: str) -> Iterator[None]:
    """Add ``request_id`` to all records made in the block, also by coroutines that it awaits."""
    token = _current_request.set(request_id)
    try:
        yield
    finally:
        _current_request.reset(token)
