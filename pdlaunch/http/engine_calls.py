"""Calls engines over HTTP/1.1; a connection is used again once its answer has come.

::

    call ── connection that rests, else a new one ──▶ request ──▶ head ──▶ body, piece by piece
                  ▲                                                            │
                  └──────────────────── all of it has come ────────────────────┘

It does what a router needs and no more: no redirects, cookies, proxies, compression. aiohttp's
client took about a fifth of a router's CPU.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import socket
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

from aiohappyeyeballs import AddrInfoType, start_connection

from pdlaunch.http.engine_connection import Answer, CallError, EngineConnection, Silence
from pdlaunch.http.lookups import look_up
from pdlaunch.http.shared_calls import SharedCalls

UNIX = "unix:"
"""Begins the URL of an engine that listens on a Unix socket; the rest is its path."""
CONNECT_S = 5.0
"""Time in which a connection to an engine must be there, where nobody says otherwise."""
MAX_PAGE_BYTES = 4 * 1024**2
"""Limits what an engine tells of itself: vLLM's /metrics has up to 300 kB, and a page of this size
takes an event loop a second to parse.
"""
_BACKLOG_S = 0.01
"""Time after which a Unix socket is tried again whose backlog is full."""
_NEXT_ADDRESS_S = 0.25
"""Time after which the next address of a name is tried, too."""
_ADDRESS = re.compile(r"[0-9.]+|.*:.*")
_FORBIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_SAFE_METHODS = frozenset({"GET", "HEAD"})


class EngineCalls:
    """Keeps the connections of a process to engines. ``close`` it.

    ``tls``: what https URLs are called with; without it the system's authorities are trusted.
    ``connect_s``: time in which a connection must be there.
    """

    def __init__(self, connect_s: float, tls: ssl.SSLContext | None = None) -> None:
        self._connect_s = connect_s
        self._tls = tls
        self._resting: dict[str, dict[EngineConnection, None]] = {}
        """By URL; the connection that was used last comes last."""
        self._addresses = SharedCalls[tuple[str, int], list[AddrInfoType]](
            lambda address: look_up(*address)
        )

    def close(self) -> None:
        """Close the connections that rest."""
        for resting in self._resting.values():
            for connection in list(resting):
                connection.transport.abort()

    async def call(
        self,
        url: str,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes,
        silence: Silence | None = None,
    ) -> Answer:
        """Send a request to the engine at ``url``; return its answer when the head has come.

        ``target``: the path, and the query. Raises CallError, and what the probe raises.
        """
        head = _head(url, method, target, headers, len(body))
        resting = self._resting.setdefault(url, {})
        while True:
            rested = _awake(resting)
            connection = rested or await self._connect(url, resting)
            answer = connection.call(head, body, silence, is_bodiless=method == "HEAD")
            try:
                await answer.head()
                return answer
            except CallError:
                answer.close()
                # The engine may close one that rests at any moment, which says nothing of it.
                if rested is None or method not in _SAFE_METHODS:
                    raise
            except BaseException:
                answer.close()
                raise

    async def ask(
        self,
        url: str,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        timeout_s: float | None,
        max_bytes: int,
    ) -> tuple[int, bytes]:
        """Return status and body of a whole answer. Raises CallError, also for a larger body."""
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self.call(url, method, target, headers, body)
                try:
                    return answer.status, await answer.read(max_bytes)
                finally:
                    answer.close()
        except TimeoutError:
            raise CallError(f"no answer within {timeout_s:g} s") from None

    async def _connect(self, url: str, resting: dict[EngineConnection, None]) -> EngineConnection:
        try:
            async with asyncio.timeout(self._connect_s):
                if url.startswith(UNIX):
                    path = url.removeprefix(UNIX)
                    return await _over(await _join(socket.AF_UNIX, path), resting)
                parts = urlsplit(url)
                tls = self._context() if parts.scheme == "https" else None
                host, port = parts.hostname or "", parts.port or (443 if tls else 80)
                if _ADDRESS.fullmatch(host):
                    family = socket.AF_INET6 if ":" in host else socket.AF_INET
                    return await _over(await _join(family, (host, port)), resting, tls, host)
                # A name may have several addresses.
                joined = await start_connection(
                    await self._addresses((host, port)), happy_eyeballs_delay=_NEXT_ADDRESS_S
                )
                return await _over(joined, resting, tls, host)
        except TimeoutError:
            reason = f"no connection within {self._connect_s:g} s"
            raise CallError(reason, unheard=True) from None
        except (OSError, ValueError) as error:
            raise CallError(f"cannot connect: {error}", unheard=True) from error

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


def _awake(resting: dict[EngineConnection, None]) -> EngineConnection | None:
    """Take the connection that was used last; None: none rests."""
    while resting:
        connection, _ = resting.popitem()
        if connection.is_quiet():
            return connection
        connection.transport.abort()
    return None


async def _over(
    joined: socket.socket,
    resting: dict[EngineConnection, None],
    tls: ssl.SSLContext | None = None,
    host: str = "",
) -> EngineConnection:
    """Return the connection over a socket that is connected."""
    _, made = await asyncio.get_running_loop().create_connection(
        lambda: EngineConnection(resting),
        sock=joined,
        ssl=tls,
        server_hostname=host if tls else None,
    )
    return made


async def _join(family: int, address: str | tuple[str, int]) -> socket.socket:
    """Connect to an address. Raises OSError.

    asyncio takes a Unix socket whose backlog is full for connected, and 70 us more for others.
    """
    joined = socket.socket(family, socket.SOCK_STREAM)
    try:
        joined.setblocking(False)
        while True:
            try:
                joined.connect(address)
            except BlockingIOError:
                if family == socket.AF_UNIX:
                    await asyncio.sleep(_BACKLOG_S)
                    continue
                await _until_connected(joined)
            return joined
    except BaseException:
        joined.close()
        raise


async def _until_connected(joined: socket.socket) -> None:
    """Wait for the other end. Raises OSError."""
    if not _has_come(joined):
        loop = asyncio.get_running_loop()
        came = asyncio.Event()
        loop.add_writer(joined, came.set)
        try:
            await came.wait()
        finally:
            loop.remove_writer(joined)
    if error := joined.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(error, os.strerror(error))


def _has_come(joined: socket.socket) -> bool:
    """Tell whether it is known what has come of connecting, as it is at once on the same host."""
    ready = select.poll()
    ready.register(joined, select.POLLOUT)
    return bool(ready.poll(0))


def _head(url: str, method: str, target: str, headers: Mapping[str, str], length: int) -> bytes:
    """Return the head of a request. Raises CallError for what cannot stand there."""
    host = "localhost" if url.startswith(UNIX) else url.partition("://")[2].rstrip("/")
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if _FORBIDDEN.search("".join(lines)):
        raise CallError("a header holds a control character", unheard=True)
    if " " in target:
        raise CallError("its path holds a space", unheard=True)
    try:
        return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise CallError("a header holds half a character", unheard=True) from None
