"""Limits the connections of one HTTP process, and how long one may idle or stall.

::

    accepted ──> waits for a request ──────────> answered ──────────> waits for the next one
                 IDLE_TIMEOUT_S, for all          a reader that takes
                 of its header; gives way         no byte is dropped
                 to new connections at the cap

The timeout of idle connections is aiohttp's own, which begins with the connection. That of readers
is the kernel's: it counts from the moment the reader's window is closed, however much is still in
buffers.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import resource
import socket
import time
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.errors import error_body

IDLE_TIMEOUT_S = 20.0
"""The next whole header must have come, counted from the accept or the last answer."""
LINGERING_S = 2.0
"""A client may go on sending a body that was answered unread."""
REFUSAL_S = 1.0
"""A client has this long to read that there is no room for its connection."""
ACCEPT_LOG_INTERVAL_S = 60.0
RESERVED_DESCRIPTORS = 64
"""Descriptors that are no clients' connections: logs, control channel, event loop, refusals."""
UPSTREAM_CONNECTIONS = 2
"""One request may have prefill and decode at once."""
_GIVING_WAY = 16
"""At the cap this part of the connections, those that idle the longest, is closed at once: a look
at all of them costs time.
"""

_logger = logging.getLogger(__name__)


class HttpRunner(web.AppRunner):
    """Serves an application within ``max_connections``; ``drop_stalled_readers`` once its sites
    have been started.
    """

    def __init__(
        self,
        app: web.Application,
        *,
        max_connections: int,
        shutdown_timeout_s: float,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        options: dict[str, Any] = {
            "access_log": None,
            "keepalive_timeout": idle_timeout_s,
            "lingering_time": LINGERING_S,
            # ``limits.read_body`` does it within bounds, and tells what is broken.
            "auto_decompress": False,
        }
        super().__init__(
            app, handler_cancellation=True, shutdown_timeout=shutdown_timeout_s, **options
        )
        self._max_connections = max_connections
        self._options = options
        self._front: _Front | None = None

    async def setup(self) -> None:
        await super().setup()
        server = super().server
        assert server is not None
        self._front = _Front(server, self._max_connections, self._options)
        asyncio.get_running_loop().set_exception_handler(AcceptErrors())

    @property
    def server(self) -> web.Server | None:
        """Return what sites make connections with."""
        return self._front  # type: ignore[return-value] # sites only call it

    def drop_stalled_readers(self, timeout_s: float) -> None:
        """End connections whose peer takes no byte of what was sent for so long; accepted sockets
        inherit the option.
        """
        if not hasattr(socket, "TCP_USER_TIMEOUT"):
            return
        for site in self.sites:
            server = site._server
            assert isinstance(server, asyncio.Server)
            for listener in server.sockets:
                listener.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000)
                )


class _Front:
    """Makes the protocol of each accepted connection."""

    def __init__(self, server: web.Server, limit: int, options: dict[str, Any]) -> None:
        self._server = server
        self._limit = limit
        self._options = options
        # Weak: a connection that could not be set up is never told that it is lost.
        self._open = weakref.WeakSet[_Connection]()

    def __call__(self) -> asyncio.Protocol:
        if len(self._open) >= self._limit and not self._close_idle():
            return _Refusal()
        connection = _Connection(
            self._open, self._server, loop=asyncio.get_running_loop(), **self._options
        )
        self._open.add(connection)
        return connection

    def _close_idle(self) -> bool:
        """Close those that idle the longest; False when none does."""
        # One look at all of them closes a sixteenth: at the cap every new connection comes here.
        idle = [connection for connection in self._open if connection.is_idle]
        for connection in heapq.nsmallest(
            1 + self._limit // _GIVING_WAY, idle, key=_Connection.idle_until_at
        ):
            self._open.discard(connection)
            connection.force_close()
        return bool(idle)


class _Connection(web.RequestHandler):
    """Counts itself among the open connections.

    What it looks at is aiohttp's own state, which has no public name.
    """

    def __init__(
        self, open_connections: weakref.WeakSet[_Connection], server: web.Server, **options: Any
    ) -> None:
        super().__init__(server, **options)
        self._open_connections = open_connections

    def connection_lost(self, exc: BaseException | None) -> None:
        self._open_connections.discard(self)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer malformed HTTP like any other error, without a traceback in the log."""
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        _logger.debug("no valid HTTP from %s: %s", request.remote, message)
        error = RequestError(
            f"the request is no valid HTTP: {message}", status=status, code="invalid_http"
        )
        response = web.Response(
            status=status,
            body=msgspec.json.encode(error_body(error)),
            content_type="application/json",
        )
        response.force_close()
        return response

    @property
    def is_idle(self) -> bool:
        """Tell whether no request is there, nor being answered."""
        return self.transport is not None and not self._request_in_progress and not self._messages

    def idle_until_at(self) -> float:
        """Return the instant at which aiohttp would close it."""
        return self._next_keepalive_close_time


class _Refusal(asyncio.Protocol):
    """Answers whatever comes with 503: every connection is busy."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        error = OverloadedError(
            "all connections of this server are busy", status=503, code="too_many_connections"
        )
        body = msgspec.json.encode(error_body(error))
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: "
            "close\r\n"
            f"Retry-After: {error.retry_after_s}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        transport.write(head.encode() + body)
        # Not closed at once: a request that is still to come would reset the connection before the
        # answer is read.
        if transport.can_write_eof():  # TLS cannot
            transport.write_eof()
        asyncio.get_running_loop().call_later(REFUSAL_S, transport.abort)


class AcceptErrors:
    """Handles errors of an event loop.

    Accepts that fail for want of a descriptor are logged once a minute, not a thousand times a
    second.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due_at = clock()

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept()" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif self._clock() >= self._due_at:
            self._due_at = self._clock() + ACCEPT_LOG_INTERVAL_S
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            _logger.error(
                "connections wait: %s; this process may open %d files (ulimit -n)",
                context.get("exception"),
                limit,
            )


def fit_requests(max_requests: int) -> int:
    """Return how many requests a router's descriptors allow at a time.

    As many idle connections find room beside them.
    """
    return max(
        1,
        min(
            max_requests, (_num_descriptors() - RESERVED_DESCRIPTORS) // (2 + UPSTREAM_CONNECTIONS)
        ),
    )


def fit_connections(max_connections: int, *, num_forwarded: int = 0) -> int:
    """Return how many connections of clients the descriptors allow.

    ``num_forwarded`` requests to engines find room beside them.
    """
    return max(
        1,
        min(
            max_connections,
            _num_descriptors() - RESERVED_DESCRIPTORS - UPSTREAM_CONNECTIONS * num_forwarded,
        ),
    )


def _num_descriptors() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**31 if limit == resource.RLIM_INFINITY else limit
