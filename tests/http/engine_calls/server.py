"""A server that answers what a test writes, byte for byte, and what calls it."""

from __future__ import annotations

import asyncio
import ssl

from pdlaunch.http.engine_calls import EngineCalls
from pdlaunch.http.engine_connection import (
    Answer,
    Silence,
)
from tests.router.fake_engine import until

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = OK + b"Content-Length: 2\r\n\r\nok"


class Server:
    """Accepts connections; the test writes what it answers, byte for byte."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.peers: list[asyncio.Transport] = []
        self.closed = asyncio.Event()
        self.num_open = 0
        self.says = b""
        """Answers each piece of a request."""

    def __call__(self) -> asyncio.Protocol:
        return Peer(self)

    async def asked(self, number: int = 1) -> asyncio.Transport:
        """Return the connection of the last request once there are so many."""
        await until(lambda: len(self.requests) >= number)
        return self.peers[-1]


class Peer(asyncio.Protocol):
    """The server's end of a connection."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.peers.append(transport)
        self._server.num_open += 1

    def data_received(self, data: bytes) -> None:
        self._server.requests.append(data)
        self._transport.write(self._server.says)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.num_open -= 1
        self._server.closed.set()


class Call:
    """A server, and what calls it."""

    def __init__(self, server: Server, url: str, tls: ssl.SSLContext | None = None) -> None:
        self.server = server
        self.url = url
        self.calls = EngineCalls(60.0, tls)

    async def call(
        self, silence: Silence | None = None, *, method: str = "POST", body: bytes = b"body"
    ) -> Answer:
        headers = {"X-Request-Id": "r1"}
        return await self.calls.call(self.url, method, "/p?q=1", headers, body, silence)

    def begin(
        self, silence: Silence | None = None, *, method: str = "POST", body: bytes = b"body"
    ) -> asyncio.Task[Answer]:
        return asyncio.ensure_future(self.call(silence, method=method, body=body))

    async def answered(self, *pieces: bytes, closes: bool = False, method: str = "POST") -> bytes:
        """Return the body of what the server answers with these pieces."""
        calling = self.begin(method=method)
        peer = await self.server.asked(len(self.server.requests) + 1)
        for piece in pieces:
            peer.write(piece)
            await asyncio.sleep(0)
        if closes:
            peer.close()
        answer = await calling
        try:
            return await answer.read()
        finally:
            answer.close()
