"""Calls engines over HTTP/1.1 with aiohttp's client; used by routers, sidecars and canaries.

Redirects, cookies, proxies and compression are off: an engine must not decide where a prompt or a
key is sent.
"""

import asyncio
import io
import ssl
from collections.abc import Mapping

import aiohttp
from aiohttp.http_exceptions import ContentLengthError, HttpProcessingError
from yarl import URL

UNIX = "unix:"  # begins the URL of an engine that listens on a Unix socket; the rest is its path
CONNECT_S = 5.0
# Largest status or metrics page of an engine. vLLM's /metrics has up to 300 kB; parsing 4 MiB
# takes a second.
MAX_PAGE_BYTES = 4 * 1024**2
MAX_BODY_BYTES = 1024**3
# Shorter than the keep-alive of any engine, so no request is sent on a connection being closed
KEEPALIVE_S = 2.0
# How long a stream may take to end after ``[DONE]``; later, its connection is closed, not reused
END_S = 1.0
# Errors of code that reads an answer which has not the expected form
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, RecursionError)
_HIGH_WATER_BYTES = 256 * 1024
_MAX_LINE_BYTES = 64 * 1024
_RAW_BODY_BYTES = 1024**2


class CallError(Exception):
    """Raised for a call without a complete answer; the reason quotes no request or answer."""

    def __init__(self, reason: str, *, not_received: bool = False) -> None:
        super().__init__(reason)
        self.not_received = not_received  # the engine cannot have received the request


class Answer:
    """Reads an answer whose headers have arrived. One task at a time; must be closed or left."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._response = response

    async def read_some(self) -> bytes:
        """Return the next bytes, empty at the end. Raises CallError."""
        try:
            return await self._response.content.readany()
        except Exception as error:
            raise _broken(error, "in the middle of its answer") from None

    async def read(self, max_bytes: int = MAX_BODY_BYTES) -> bytes:
        """Return the whole body. Raises CallError, also if it exceeds ``max_bytes``."""
        pieces, num_bytes = [], 0
        while piece := await self.read_some():
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise CallError(f"its answer has more than {max_bytes} bytes")
        return b"".join(pieces)

    def close(self) -> None:
        """Close the connection, unless the answer is complete, so that the engine stops working."""
        # Abort: unsent bytes of a long request would keep the connection open.
        if (connection := self._response.connection) is not None and connection.transport:
            connection.transport.abort()
        self._response.close()

    def leave(self) -> None:
        """Keep the connection for reuse if the answer ends within END_S, as after ``[DONE]``."""
        if self._response.connection is not None:
            asyncio.get_running_loop().call_later(END_S, self._response.close)


class EngineCalls:
    """Holds the connections of a process to engines. Must be closed."""

    def __init__(self, connect_s: float = CONNECT_S, tls: ssl.SSLContext | None = None) -> None:
        self._connect_s = connect_s
        self._tls = tls
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        """By path of a Unix socket; the empty path is for all TCP connections."""

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    async def call(
        self, url: str, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> Answer:
        """Send a request; return its answer once the headers are there. Raises CallError."""
        base = "http://localhost" if url.startswith(UNIX) else url.rstrip("/")
        try:
            response = await self._session(url).request(
                method,
                URL(base + target, encoded=True),
                headers=headers,
                # aiohttp copies a long ``bytes`` body at each write, and warns about it.
                data=body if len(body) <= _RAW_BODY_BYTES else io.BytesIO(body),
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            late = f"no connection within {self._connect_s:g} s"
            reason = late if isinstance(error, TimeoutError) else f"cannot connect: {error}"
            raise CallError(reason, not_received=True) from None
        except (ValueError, aiohttp.InvalidURL) as error:
            raise CallError(f"the request cannot be sent: {error}", not_received=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _broken(error, "without an answer") from None
        return Answer(response)

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
        """Return status, body and content type of a complete answer. Raises CallError."""
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

    def _session(self, url: str) -> aiohttp.ClientSession:
        path = url.removeprefix(UNIX) if url.startswith(UNIX) else ""
        if (known := self._sessions.get(path)) is not None:
            return known
        connector: aiohttp.BaseConnector
        if path:
            connector = aiohttp.UnixConnector(path, limit=0, keepalive_timeout=KEEPALIVE_S)
        else:
            tls = self._tls or True
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ssl=tls)
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
    """Return the error for an incomplete answer, without aiohttp's text, which may quote it."""
    cause = error if isinstance(error, aiohttp.ClientResponseError) else error.__cause__
    is_cut = isinstance(cause, ContentLengthError) or "Not enough data" in str(cause)
    if isinstance(cause, aiohttp.ClientResponseError | HttpProcessingError) and not is_cut:
        return CallError("its answer is not valid HTTP")
    return CallError(f"it closed the connection {when}")
