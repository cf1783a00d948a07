"""Limits the number of connections of one HTTP process, and how long each may idle or stall.

::

    accepted ──> waits for a request ──────────> answered ──────────> waits for the next one
                 IDLE_TIMEOUT_S for the           a client that reads
                 whole header; closed at the      nothing is dropped
                 cap, for a new connection

Over TLS, the wait includes the handshake, which may take HANDSHAKE_TIMEOUT_S.

The kernel drops clients that stop reading: its timer starts when the client's TCP window is full,
however many bytes are still in buffers. This module uses private names of aiohttp for the state of
idle connections, and of asyncio for the TLS protocol below a connection.
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import heapq
import logging
import resource
import socket
import ssl
import weakref
from typing import Any

from aiohttp import web

from pdlaunch.errors import OverloadedError, RequestError, StartupError
from pdlaunch.http.errors import error_response
from pdlaunch.http.lifecycle import SHUTDOWN_TIMEOUT_S

# Limit between the accept, or the last answer, and the end of the next request's header
IDLE_TIMEOUT_S = 20.0
HANDSHAKE_TIMEOUT_S = 5  # asyncio's default is 60
LINGERING_S = 2.0  # how long a client may go on sending a body after the answer to it
REFUSAL_S = 1.0  # time to answer a connection beyond the limit
ACCEPT_LOG_INTERVAL_S = 60.0
# File descriptors for other uses than clients: logs, control channel, event loop, refusals
RESERVED_DESCRIPTORS = 64
UPSTREAM_CONNECTIONS = 2  # a request may use prefill and decode at the same time
# At the cap, 1/16 of the connections are closed at once, the longest idle ones first.
_GIVING_WAY = 16

_logger = logging.getLogger(__name__)


class HttpRunner(web.AppRunner):
    """Serves an application; call ``drop_stalled_readers`` once its sites have started."""

    def __init__(
        self,
        app: web.Application,
        *,
        max_connections: int,
        shutdown_timeout_s: float = SHUTDOWN_TIMEOUT_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Set ``tls`` instead of the ``ssl_context`` of sites."""
        super().__init__(app, handler_cancellation=True, shutdown_timeout=shutdown_timeout_s)
        self._max_connections = max_connections
        self._tls = tls
        self._options: dict[str, Any] = {
            "access_log": None,
            "keepalive_timeout": idle_timeout_s,
            "lingering_time": LINGERING_S,
            "auto_decompress": False,  # the guard refuses compressed bodies
        }
        # Weak: ``connection_lost`` is not called for a connection whose setup failed.
        self._open = weakref.WeakSet[_Connection]()
        self._accept_log_due_at = 0.0

    async def setup(self) -> None:
        await super().setup()
        asyncio.get_running_loop().set_exception_handler(self._on_error)

    @property
    def server(self) -> web.Server | None:
        return self._connect  # type: ignore[return-value] # sites only call it, to connect

    def _connect(self) -> asyncio.BaseProtocol:
        server = super().server
        assert server is not None
        has_room = len(self._open) < self._max_connections or self._close_idle()
        loop = asyncio.get_running_loop()
        connection = _Connection(self._open, server, loop=loop, **self._options)
        if has_room:
            self._open.add(connection)
        else:
            connection._request_handler = _refuse
            loop.call_later(REFUSAL_S, connection.drop)
        return connection if self._tls is None else _Tls(connection, self._tls)

    def _close_idle(self) -> bool:
        """Close the connections that have idled longest; return False if none is idle."""
        idle = [connection for connection in self._open if connection.is_idle]
        number = 1 + self._max_connections // _GIVING_WAY
        for connection in heapq.nsmallest(number, idle, lambda one: one._next_keepalive_close_time):
            self._open.discard(connection)
            # Later: a connection that was just accepted may not have its socket yet.
            asyncio.get_running_loop().call_soon(connection.drop)
        return bool(idle)

    def drop_stalled_readers(self, timeout_s: float) -> None:
        """End connections whose client reads nothing for ``timeout_s``; inherited by new ones."""
        option, timeout_ms = socket.TCP_USER_TIMEOUT, int(timeout_s * 1000)
        for site in self.sites:
            assert isinstance(site._server, asyncio.Server)
            for listener in site._server.sockets:
                listener.setsockopt(socket.IPPROTO_TCP, option, timeout_ms)

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept()" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif loop.time() >= self._accept_log_due_at:
            # Without free descriptors, accepts fail a thousand times a second.
            self._accept_log_due_at = loop.time() + ACCEPT_LOG_INTERVAL_S
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            text = "new connections wait: %s; this process may open %d files (ulimit -n)"
            _logger.error(text, context.get("exception"), limit)


class _Connection(web.RequestHandler):
    def __init__(
        self, open_connections: weakref.WeakSet[_Connection], server: web.Server, **options: Any
    ) -> None:
        super().__init__(server, **options)
        self._open_connections = open_connections
        self.is_half_closed = False
        self.socket_below_tls: asyncio.Transport | None = None
        # aiohttp sets it only after the TLS handshake.
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout

    def eof_received(self) -> bool:  # type: ignore[override] # asyncio uses the result
        """Return True to keep a half-closed connection open until its request is answered."""
        if self.is_idle or self.ssl_context is not None:  # TLS cannot be half closed
            return False
        self.close()  # once the request is answered
        self.is_half_closed = True
        self._lingering_time = 0.0  # no rest of a body will come
        request = self._current_request
        if request is not None and must_end(request) and self._task_handler is not None:
            self._task_handler.cancel()
        return True

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
        text = f"the request is not valid HTTP: {message}"
        response = error_response(RequestError(text, status=status, code="invalid_http"))
        response.force_close()
        return response

    @property
    def is_idle(self) -> bool:
        """Return True if no request is received or answered, also before the TLS handshake."""
        if self._task_handler is None:
            return True
        return self._waiter is not None and not self._waiter.done()

    def drop(self) -> None:
        """Close the connection in any state; bytes already written are still sent."""
        self.force_close()
        # TLS would wait for the handshake, or for the peer's close_notify.
        if (below := self.socket_below_tls) is not None and not below.get_write_buffer_size():
            below.abort()


class _Tls(asyncio.sslproto.SSLProtocol):
    """Gives a connection its socket before the TLS handshake, and reports failed handshakes."""

    def __init__(self, connection: _Connection, context: ssl.SSLContext) -> None:
        super().__init__(
            connection._loop,
            connection,
            context,
            None,  # type: ignore[arg-type] # no future waits for the handshake
            server_side=True,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
        )
        self._connection = connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._connection.socket_below_tls = transport
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        # asyncio calls it only after a completed handshake; a second call does nothing.
        self._loop.call_soon(self._connection.connection_lost, exc)


async def _refuse(_: web.BaseRequest) -> web.StreamResponse:
    message = "all connections of this server are busy (limits.max_connections)"
    response = error_response(OverloadedError(message, status=503, code="too_many_connections"))
    response.force_close()
    return response


def must_end(http: web.BaseRequest) -> bool:
    """Return True if the client may have left: its sending side is closed. False for GET, HEAD."""
    is_half_closed = isinstance(http.protocol, _Connection) and http.protocol.is_half_closed
    return is_half_closed and http.method not in ("GET", "HEAD")


def fit(wanted: int, *, num_each: int = 1, num_others: int = 0) -> int:
    """Return how many connections fit, at most ``wanted``. Raises StartupError if none fits."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return wanted
    least = RESERVED_DESCRIPTORS + num_others + num_each
    if limit < least:
        raise StartupError(
            f"this process may open {limit} files, but needs {least} to answer one request: raise "
            "the hard limit (`ulimit -Hn`), best to 4096 or more"
        )
    return min(wanted, (limit - RESERVED_DESCRIPTORS - num_others) // num_each)
