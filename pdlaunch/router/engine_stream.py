"""Reads an engine's stream: chunks for the client, and what the engine tells the router alone."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from pdlaunch.errors import ProtocolError
from pdlaunch.http.engine_calls import CallError
from pdlaunch.http.sse import DONE_DATA, EventDecoder
from pdlaunch.observe.spans import SpanReport
from pdlaunch.protocol.openai.responses import REPORT_KEY, WORK_KEY
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_errors import MAX_QUOTE_BYTES, EngineFailure, EngineRefusal, error_names

Chunk = dict[str, Any]
"""A chunk of an engine's stream; members that the router does not know are passed on."""

REPORT_BEGINNING = b'{"choices":[],"%s":' % REPORT_KEY.encode()
"""Begins the event in which an engine of ours tells its spans."""


class _ReportEvent(msgspec.Struct, rename={"report": REPORT_KEY}):
    report: SpanReport


# Read into its types at once, at half the price of doing it in two steps.
_report_event = msgspec.json.Decoder(_ReportEvent)


def read_report(event: bytes) -> SpanReport:
    """Return what an event that begins like one tells. Raises ValueError, RecursionError."""
    return _report_event.decode(event).report


_CLIENT_ERROR_TYPES = frozenset({"invalid_request_error", "BadRequestError", "NotFoundError"})


class EngineStream:
    """Reads the chunks of one answer, up to ``[DONE]`` or the end of the connection.

    ``read_some`` returns the next bytes, none at the end, and raises CallError; ``hear`` takes what
    the engine tells of its work beside the answer.
    """

    def __init__(
        self,
        engine: Engine,
        ignored_fields: Sequence[str],
        *,
        read_some: Callable[[], Awaitable[bytes]],
        hear: Callable[[Engine, object], None],
    ) -> None:
        self._engine = engine
        self._read_some = read_some
        self._hear = hear
        self._events = EventDecoder()
        self._pending: deque[bytes] = deque()
        self.ignored_fields = ignored_fields
        """Names of the fields that the engine has ignored."""
        self.waited_s = 0.0
        """Time in which the engine was waited for; slow clients do not count."""
        self.is_done = False
        """It has said ``[DONE]``."""
        self.report: object = None
        """The engine's spans, once it has sent them, before its end."""

    @property
    def has_more(self) -> bool:
        """Tell whether the next chunk is here, and no error."""
        return (
            bool(self._pending)
            and self._pending[0].startswith(b"{")
            and not (self._pending[0].startswith(b'{"error"'))
        )

    async def next_chunk(self) -> Chunk | None:
        """Return the next chunk, None at the end.

        Raises EngineFailure, or EngineRefusal for an error event about the request.
        """
        while (data := await self._next_event()) is not None and data != DONE_DATA:
            if data.startswith(REPORT_BEGINNING):
                with contextlib.suppress(ValueError, RecursionError):
                    self.report = read_report(data)
                    continue
            chunk = self._decode(data)
            if REPORT_KEY not in chunk:
                return chunk
            self.report = chunk[REPORT_KEY]
        self.is_done = data is not None
        return None

    async def _next_event(self) -> bytes | None:
        while not self._pending:
            asked_at = time.monotonic()
            try:
                received = await self._read_some()
            except CallError as error:
                raise EngineFailure(self._engine, f"stream broke: {error}") from error
            self.waited_s += time.monotonic() - asked_at
            if not received:
                return None
            try:
                self._pending.extend(self._events.feed(received))
            except ProtocolError as error:
                raise EngineFailure(self._engine, str(error), may_return=False) from error
        return self._pending.popleft()

    def _decode(self, data: bytes) -> Chunk:
        try:
            chunk = msgspec.json.decode(data)
        except (ValueError, RecursionError) as error:
            raise EngineFailure(
                self._engine, f"malformed event: {error}", may_return=False
            ) from error
        if not isinstance(chunk, dict):
            raise EngineFailure(self._engine, "an event that is no object", may_return=False)
        if WORK_KEY in chunk:
            self._hear(self._engine, chunk.pop(WORK_KEY))
        if "error" in chunk:
            self._raise_error(data, chunk["error"])
        return chunk

    def _raise_error(self, data: bytes, error: object) -> None:
        fields = error if isinstance(error, dict) else {}
        if fields.get("type") in _CLIENT_ERROR_TYPES:
            raise EngineRefusal(self._engine, status=400, body=data)
        raise EngineFailure(
            self._engine,
            f"error in its stream{error_names(fields)}",
            may_return=fields.get("type") != "server_error",
            engine_code=fields.get("code"),
            quote=str(fields.get("message", error))[:MAX_QUOTE_BYTES],
            is_told=True,
        )
