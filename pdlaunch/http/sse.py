"""Sends and reads server-sent events as OpenAI does: ``data:`` lines, and ``[DONE]`` at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec
from aiohttp import web

from pdlaunch.errors import ProtocolError
from pdlaunch.http.errors import error_payload

DONE = b"data: [DONE]\n\n"
DONE_DATA = b"[DONE]"
MAX_EVENT_BYTES = 16 * 1024**2
LAST_WORD_S = 1.0  # how long the event of an error waits for a client that does not read

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # nginx would collect events before it passes them on.
    "X-Accel-Buffering": "no",
}
_encoder = msgspec.json.Encoder()


def encode_event(payload: object) -> bytes:
    """Return one event; msgspec must be able to encode ``payload``."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


def encode_error(error: BaseException) -> bytes:
    """Return the event that ends a stream which failed; no ``[DONE]`` follows it."""
    return encode_event(error_payload(error))


class _StreamResponse(web.StreamResponse):
    """Keeps its headers back until the first piece of the body, and sends both in one piece.

    aiohttp has no public name for it; ``web.Response`` does the same.
    """

    _send_headers_immediately = False


class ClientStream:
    """Sends the events of one streamed answer, the headers with the first event."""

    def __init__(self, http: web.BaseRequest, headers: Mapping[str, str]) -> None:
        self._http = http
        self._preparing = asyncio.Lock()
        self.response = _StreamResponse(headers=_HEADERS | dict(headers))
        http[STREAM] = self

    @property
    def has_begun(self) -> bool:
        """Tell whether the client has been sent a status, so that an error must be an event."""
        return self.response.prepared

    def add_headers(self, headers: Mapping[str, str]) -> None:
        self.response.headers.update(headers)

    async def write(self, event: bytes) -> None:
        """Send one event, and wait while the reader is behind. Raises ConnectionError."""
        if not self.response.prepared:
            await self._begin()
        await self.response.write(event)

    async def end(self, last: bytes = b"") -> None:
        await self._begin()
        # In one piece: whoever reads the last event has the end too, and can use the connection
        # again at once.
        await self.response.write_eof(last)

    async def fail(self, error: BaseException) -> None:
        """End the stream with an error; a client that does not read is dropped."""
        try:
            async with asyncio.timeout(LAST_WORD_S):
                await self.end(encode_error(error))
        except TimeoutError:
            if self._http.transport is not None:
                self._http.transport.abort()

    async def _begin(self) -> None:
        # Several prompts of one request may have their first event at once.
        if not self.response.prepared:
            async with self._preparing:
                if not self.response.prepared:
                    await self.response.prepare(self._http)


STREAM = web.RequestKey("stream", ClientStream)


class EventDecoder:
    """Cuts a byte stream into the data of its events, wherever the stream was split."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of the events that ``received`` completes, ``DONE_DATA`` among them.

        Raises ProtocolError when an event exceeds ``MAX_EVENT_BYTES``.
        """
        events: list[bytes] = []
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise ProtocolError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            line = line.removesuffix(b"\r")
            # Comments and other fields are dropped; an empty line ends an event.
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
