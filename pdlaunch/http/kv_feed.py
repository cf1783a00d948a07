"""Streams the prefixes of an engine's KV cache from its server or sidecar to routers.

::

    rank 0, or vLLM ──> KVFeed ──┬── GET /pdlaunch/kv_events ──> all that is held, then changes
                                 └── ...                         one stream for each router

Each stream begins with all prefixes, so a router that reconnects misses nothing. The stream of a
router that reads too slowly is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from pdlaunch.errors import ProtocolError
from pdlaunch.http.engine_calls import Answer
from pdlaunch.protocol.kv_events import HeldBlocks, KVBlocks, kv_blocks
from pdlaunch.protocol.wire import MAX_FRAME_BYTES

KV_EVENTS_PATH = "/pdlaunch/kv_events"
_MAX_WAITING = 1024  # messages that a stream may be behind
_LENGTH_BYTES = 4


class KVFeed:
    """Holds the prefixes of one engine and streams them; belongs to the event loop."""

    def __init__(self) -> None:
        self._held = HeldBlocks()
        self._streams: set[asyncio.Queue[bytes | None]] = set()
        self._is_closed = False

    def tell(self, change: KVBlocks) -> None:
        self._held.apply(change)
        frame = _framed(change) if self._streams else b""
        for stream in [*self._streams]:
            try:
                stream.put_nowait(frame)
            except asyncio.QueueFull:
                self._end(stream)

    def close(self) -> None:
        """End all streams, and those to come."""
        self._is_closed = True
        for stream in [*self._streams]:
            self._end(stream)

    async def send(self, http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await response.prepare(http)
        stream: asyncio.Queue[bytes | None] = asyncio.Queue(_MAX_WAITING)
        self._streams.add(stream)
        if self._is_closed:
            self._end(stream)
        try:
            # No change comes between these: nothing else runs until the first of them is sent.
            for frame in [_framed(message) for message in self._held.messages()]:
                await response.write(frame)
            while (frame_or_end := await stream.get()) is not None:
                await response.write(frame_or_end)
        finally:
            self._streams.discard(stream)
        return response

    def _end(self, stream: asyncio.Queue[bytes | None]) -> None:
        self._streams.discard(stream)
        while not stream.empty():
            stream.get_nowait()
        stream.put_nowait(None)


async def read_feed(answer: Answer) -> AsyncIterator[KVBlocks]:
    """Yield the messages of a stream. Raises CallError, ProtocolError."""
    received = bytearray()
    while piece := await answer.read_some():
        received += piece
        while len(received) >= _LENGTH_BYTES:
            length = int.from_bytes(received[:_LENGTH_BYTES], "big")
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a message of {length} bytes")
            if len(received) < _LENGTH_BYTES + length:
                break
            frame = bytes(received[_LENGTH_BYTES : _LENGTH_BYTES + length])
            del received[: _LENGTH_BYTES + length]
            yield kv_blocks.decode(frame)


def _framed(message: KVBlocks) -> bytes:
    frame = kv_blocks.encode(message)
    return len(frame).to_bytes(_LENGTH_BYTES, "big") + frame
