"""Calls engines over HTTP/1.1 through aiohttp's client, the only one that routers, sidecars and
canaries use.

Redirects, cookies, proxies and compression are off: an engine must not choose where a prompt or a
key goes.
"""

from __future__ import annotations

import asyncio
import io
import ssl
from collections.abc import Mapping

import aiohttp
from aiohttp.http_exceptions import ContentLengthError, HttpProcessingError
from yarl import URL

UNIX = "unix:"  # begins the URL of an engine that listens on a Unix socket; the rest is its path
CONNECT_S = 5.0
# Largest status or metrics page of an engine. vLLM's /metrics has up to 300 kB; a page of this
# size takes a second to parse.
MAX_PAGE_BYTES = 4 * 1024**2
MAX_BODY_BYTES = 1024**3
# Shorter than any engine's own, so that no request meets a connection that is being closed.
KEEPALIVE_S = 2.0
# How long a stream that has said ``[DONE]`` may take to end, to use its connection again.
END_S = 1.0
_HIGH_WATER_BYTES = 256 * 1024
_MAX_LINE_BYTES = 64 * 1024
_RAW_BODY_BYTES = 1024**2


class CallError(Exception):
    """A call that has no whole answer; the reason quotes nothing that was sent or received.

    ``not_received``: the engine cannot have seen the request.
    """

    def __init__(self, reason: str, *, not_received: bool = False) -> None:
        super().__init__(reason)
        self.not_received = not_received


class Answer:
    """An answer whose head has come; read by one task at a time. ``close`` or ``leave`` it."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._response = response

    async def read_some(self) -> bytes:
        """Return the next bytes, none at the end. Raises CallError."""
        try:
            return await self._response.content.readany()
        except Exception as error:
            raise _broken(error, "in the middle of its answer") from None

    async def read(self, max_bytes: int = MAX_BODY_BYTES) -> bytes:
        """Return the whole body. Raises CallError, also for a larger one."""
        pieces, num_bytes = [], 0
        while piece := await self.read_some():
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise CallError(f"its answer has more than {max_bytes} bytes")
        return b"".join(pieces)

    def close(self) -> None:
        """Give up what has not come, by closing the connection: that ends the engine's work."""
        # At once: what is left of a long request would keep the connection open.
        if (connection := self._response.connection) is not None and connection.transport:
            connection.transport.abort()
        self._response.close()

    def leave(self) -> None:
        """Use the connection again if the answer ends soon, as one that said ``[DONE]`` does."""
        if self._response.connection is not None:
            asyncio.get_running_loop().call_later(END_S, self._response.close)


class EngineCalls:
    """Keeps the connections of a process to engines. ``close`` it.

    ``tls``: used for https URLs, in place of the system's authorities.
    """

    def __init__(self, connect_s: float = CONNECT_S, tls: ssl.SSLContext | None = None) -> None:
        self._connect_s = connect_s
        self._tls = tls
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        """One for each Unix socket, and one for all else."""

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    async def call(
        self, url: str, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> Answer:
        """Send a request to the engine at ``url``; return its answer when the head has come.

        ``target``: the path, and the query. Raises CallError.
        """
        return Answer(await self._request(url, method, target, headers, body))

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
    ) -> tuple[int, bytes, str]:
        """Return status, body and content type of a whole answer.

        Raises CallError, also for a larger body.
        """
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self.call(url, method, target, headers, body)
                try:
                    kind = answer.headers.get("content-type", "application/octet-stream")
                    return answer.status, await answer.read(max_bytes), kind
                finally:
                    answer.close()
        except TimeoutError:
            raise CallError(f"no answer within {timeout_s:g} s") from None

    async def _request(
        self, url: str, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> aiohttp.ClientResponse:
        base = "http://localhost" if url.startswith(UNIX) else url.rstrip("/")
        try:
            return await self._session(url).request(
                method,
                URL(base + target, encoded=True),
                headers=headers,
                # aiohttp copies a long bytes body at each write, and warns of it.
                data=body if len(body) <= _RAW_BODY_BYTES else io.BytesIO(body),
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            is_late = isinstance(error, TimeoutError)
            late = f"no connection within {self._connect_s:g} s"
            reason = late if is_late else f"cannot connect: {error}"
            raise CallError(reason, not_received=True) from None
        except (ValueError, aiohttp.InvalidURL) as error:
            raise CallError(f"the request cannot be sent: {error}", not_received=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _broken(error, "without an answer") from None

    def _session(self, url: str) -> aiohttp.ClientSession:
        path = url.removeprefix(UNIX) if url.startswith(UNIX) else ""
        if (known := self._sessions.get(path)) is not None:
            return known
        connector: aiohttp.BaseConnector
        if path:
            connector = aiohttp.UnixConnector(path, limit=0, keepalive_timeout=KEEPALIVE_S)
        else:
            connector = aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=KEEPALIVE_S,
                ssl=self._tls or True,
            )
        session = self._sessions[path] = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            read_bufsize=_HIGH_WATER_BYTES,
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_LINE_BYTES,
        )
        return session


def _broken(error: BaseException, when: str) -> CallError:
    """Return the error for an answer that broke off; aiohttp's own words may quote it."""
    cause = error if isinstance(error, aiohttp.ClientResponseError) else error.__cause__
    is_cut = isinstance(cause, ContentLengthError) or "Not enough data" in str(cause)
    if isinstance(cause, aiohttp.ClientResponseError | HttpProcessingError) and not is_cut:
        return CallError("its answer is no valid HTTP")
    return CallError(f"it closed the connection {when}")
