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
import re
import socket
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

from pdlaunch.http.engine_connection import Answer, CallError, Connection, Silence
from pdlaunch.http.engine_url import UNIX

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
        self._resting: dict[str, dict[Connection, None]] = {}
        """By URL; the connection that was used last comes last."""

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

    async def _connect(self, url: str, resting: dict[Connection, None]) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                if url.startswith(UNIX):
                    joined = await _join_unix(url.removeprefix(UNIX))
                    _, made = await loop.create_unix_connection(
                        lambda: Connection(resting), sock=joined
                    )
                    return made
                parts = urlsplit(url)
                tls = self._context() if parts.scheme == "https" else None
                host, port = parts.hostname or "", parts.port or (443 if tls else 80)
                # Names may have several addresses.
                delay_s = None if _ADDRESS.fullmatch(host) else _NEXT_ADDRESS_S
                _, made = await loop.create_connection(
                    lambda: Connection(resting), host, port, ssl=tls, happy_eyeballs_delay=delay_s
                )
                return made
        except TimeoutError:
            reason = f"no connection within {self._connect_s:g} s"
            raise CallError(reason, unheard=True) from None
        except (OSError, ValueError) as error:
            raise CallError(f"cannot connect: {error}", unheard=True) from error

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


def _awake(resting: dict[Connection, None]) -> Connection | None:
    """Take the connection that was used last; None: none rests."""
    while resting:
        connection, _ = resting.popitem()
        if connection.is_quiet():
            return connection
        connection.transport.abort()
    return None


async def _join_unix(path: str) -> socket.socket:
    """Connect to a Unix socket. asyncio takes one whose backlog is full for connected."""
    joined = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        joined.setblocking(False)
        while True:
            try:
                joined.connect(path)
            except BlockingIOError:
                await asyncio.sleep(_BACKLOG_S)
            else:
                return joined
    except BaseException:
        joined.close()
        raise


def _head(url: str, method: str, target: str, headers: Mapping[str, str], length: int) -> bytes:
    """Return the head of a request. Raises CallError for what cannot stand there."""
    host = "localhost" if url.startswith(UNIX) else url.partition("://")[2].rstrip("/")
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if any(_FORBIDDEN.search(line) for line in lines):
        raise CallError("a header holds a control character", unheard=True)
    if " " in target:
        raise CallError("its path holds a space", unheard=True)
    try:
        return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise CallError("a header holds half a character", unheard=True) from None
