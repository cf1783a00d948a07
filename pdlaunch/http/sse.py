"""Sends and reads server-sent events in OpenAI's form: ``data:`` lines, ``[DONE]`` at the end."""

import asyncio
from collections.abc import Mapping

import msgspec
from aiohttp import web

from pdlaunch.errors import ProtocolError
from pdlaunch.http.errors import error_payload

DONE = b"data: [DONE]\n\n"
DONE_DATA = b"[DONE]"
MAX_EVENT_BYTES = 16 * 1024**2
LAST_WORD_S = 1.0  # limit for sending the event of an error to a client that does not read

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # Without this header, nginx would buffer events.
    "X-Accel-Buffering": "no",
}
_encoder = msgspec.json.Encoder()


def encode_event(payload: object) -> bytes:
    """Return ``payload`` as one event; msgspec must be able to encode it."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


class ClientStream:
    """Sends the events of one streamed answer; the headers go out with the first event."""

    def __init__(self, http: web.BaseRequest, headers: Mapping[str, str]) -> None:
        self._http = http
        self._preparing = asyncio.Lock()
        self.response = web.StreamResponse(headers=_HEADERS | dict(headers))
        # Send them with the first piece of the body. Aiohttp has no public name for this option.
        self.response._send_headers_immediately = False
        http[STREAM] = self

    @property
    def has_begun(self) -> bool:
        """Return True if a status was sent to the client, so an error must be an event."""
        return self.response.prepared

    async def write(self, event: bytes) -> None:
        """Send one event, and wait while the client reads too slowly. Raises ConnectionError."""
        if not self.response.prepared:
            await self._begin()
        await self.response.write(event)

    async def end(self, last: bytes = b"") -> None:
        await self._begin()
        # Send both in one piece: a client that reads the last event also reads the end of the body,
        # and can reuse the connection at once.
        await self.response.write_eof(last)

    async def fail(self, error: BaseException) -> None:
        """End the stream with an error event; cut a client that does not read."""
        try:
            async with asyncio.timeout(LAST_WORD_S):
                await self.end(encode_event(error_payload(error)))
        except TimeoutError:
            if self._http.transport is not None:
                self._http.transport.abort()

    async def _begin(self) -> None:
        # Several prompts of one request may send their first event at the same time.
        async with self._preparing:
            if not self.response.prepared:
                await self.response.prepare(self._http)


STREAM = web.RequestKey("stream", ClientStream)


class EventDecoder:
    """Decodes the events of a byte stream, which may be split at any byte."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of the events that ``received`` completes, ``DONE_DATA`` among them."""
        events: list[bytes] = []
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise ProtocolError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            line = line.removesuffix(b"\r")
            # Drop comments and other fields; an empty line ends an event.
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
