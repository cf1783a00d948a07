"""Streams the prefixes of an engine's KV cache from its server or sidecar to routers.

::

    rank 0, or vLLM ──> KVFeed ──┬── GET /pdlaunch/kv_events ──> all prefixes, then changes
                                 └── ...                         one stream for each router

Each stream begins with all prefixes, so a router that reconnects misses nothing. The stream of a
router that reads too slowly is closed.
"""

import asyncio
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web

from pdlaunch.errors import ProtocolError
from pdlaunch.http.engine_calls import Answer
from pdlaunch.protocol.kv_events import HeldBlocks, KVBlocks, kv_blocks
from pdlaunch.protocol.wire import MAX_FRAME_BYTES

KV_EVENTS_PATH = "/pdlaunch/kv_events"
_MAX_WAITING = 1024  # unsent messages of one stream; with more, it is closed
_LENGTH_BYTES = 4


class KVFeed:
    """Holds the prefixes of one engine, by data parallel rank, and streams them."""

    def __init__(self, num_ranks: int = 1) -> None:
        self._ranks = [HeldBlocks(rank) for rank in range(num_ranks)]
        # Capacity of each rank's cache in vLLM, whose events lack it; 0: unknown, or native
        self.num_tokens = 0
        self._streams: set[asyncio.Queue[bytes | None]] = set()
        self._is_closed = False

    def publish(self, change: KVBlocks) -> None:
        if self.num_tokens:
            num_blocks = self.num_tokens // max(1, change.block_size)
            change = msgspec.structs.replace(change, num_blocks=num_blocks)
        self._ranks[change.dp_rank].apply(change)
        frame = _framed(change) if self._streams else b""
        for stream in [*self._streams]:
            try:
                stream.put_nowait(frame)
            except asyncio.QueueFull:
                self._end(stream)

    def close(self) -> None:
        """End all streams; later streams end after their first messages."""
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
            # All frames are built before the first await, so no change can come between them.
            messages = (message for held in self._ranks for message in held.messages())
            for frame in [*map(_framed, messages)]:
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
    """Yield the messages of a ``KVFeed`` stream. Raises CallError, ProtocolError."""
    received = bytearray()
    while piece := await answer.read_some():
        received += piece
        while len(received) >= _LENGTH_BYTES:
            length = int.from_bytes(received[:_LENGTH_BYTES], "big")
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a message of {length} bytes, more than {MAX_FRAME_BYTES}")
            if len(received) < _LENGTH_BYTES + length:
                break
            frame = bytes(received[_LENGTH_BYTES : _LENGTH_BYTES + length])
            del received[: _LENGTH_BYTES + length]
            yield kv_blocks.decode(frame)


def _framed(message: KVBlocks) -> bytes:
    frame = kv_blocks.encode(message)
    return len(frame).to_bytes(_LENGTH_BYTES, "big") + frame
