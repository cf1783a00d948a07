"""Limits the connections of one HTTP process, and how long one may idle or stall.

::

    accepted ──> waits for a request ──────────> answered ──────────> waits for the next one
                 IDLE_TIMEOUT_S, for all          a reader that takes
                 of its header; gives way         no byte is dropped
                 to new connections at the cap

Over TLS, the wait begins before the handshake, which has HANDSHAKE_TIMEOUT_S.

The kernel drops readers that stall: it counts from the moment the reader's window is closed,
however much is still in buffers. Idle connections and their state are aiohttp's, which has no
public names for it; TLS is asyncio's, which has none for the protocol below a connection.
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

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.errors import error_response

# The next whole header must have come, counted from the accept or the last answer.
IDLE_TIMEOUT_S = 20.0
HANDSHAKE_TIMEOUT_S = 5  # asyncio's default is 60
LINGERING_S = 2.0  # a client may go on sending a body that was answered unread
REFUSAL_S = 1.0  # time to answer a connection beyond the limit
ACCEPT_LOG_INTERVAL_S = 60.0
# Descriptors that are no clients' connections: logs, control channel, event loop, refusals.
RESERVED_DESCRIPTORS = 64
UPSTREAM_CONNECTIONS = 2  # a request may use prefill and decode at the same time
# At the cap, a 16th of the connections is closed at once, the longest idle ones first.
_GIVING_WAY = 16

_logger = logging.getLogger(__name__)


class HttpRunner(web.AppRunner):
    """Serves an application within ``max_connections``; then call ``drop_stalled_readers``."""

    def __init__(
        self,
        app: web.Application,
        *,
        max_connections: int,
        shutdown_timeout_s: float,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``tls``: instead of an ``ssl_context`` of the sites."""
        super().__init__(app, handler_cancellation=True, shutdown_timeout=shutdown_timeout_s)
        self._max_connections = max_connections
        self._tls = tls
        self._options: dict[str, Any] = {
            "access_log": None,
            "keepalive_timeout": idle_timeout_s,
            "lingering_time": LINGERING_S,
            "auto_decompress": False,  # the guard refuses compressed bodies
        }
        # Weak: a connection that could not be set up is never told that it is lost.
        self._open = weakref.WeakSet[_Connection]()
        self._accept_log_due_at = 0.0

    async def setup(self) -> None:
        await super().setup()
        asyncio.get_running_loop().set_exception_handler(self._on_error)

    @property
    def server(self) -> web.Server | None:
        """Return what sites make connections with."""
        return self._connect  # type: ignore[return-value] # sites only call it

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
        """Close those that idle the longest; False when none does."""
        idle = [connection for connection in self._open if connection.is_idle]
        number = 1 + self._max_connections // _GIVING_WAY
        for connection in heapq.nsmallest(number, idle, key=_Connection.idle_until_at):
            self._open.discard(connection)
            # If it was accepted just now, it gets its socket first.
            asyncio.get_running_loop().call_soon(connection.drop)
        return bool(idle)

    def drop_stalled_readers(self, timeout_s: float) -> None:
        """End connections whose peer reads nothing for so long; accepted sockets inherit this."""
        if not hasattr(socket, "TCP_USER_TIMEOUT"):
            return
        for site in self.sites:
            assert isinstance(site._server, asyncio.Server)
            for listener in site._server.sockets:
                listener.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000)
                )

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept()" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif loop.time() >= self._accept_log_due_at:
            # For want of a descriptor accepts fail a thousand times a second.
            self._accept_log_due_at = loop.time() + ACCEPT_LOG_INTERVAL_S
            _logger.error(
                "connections wait: %s; this process may open %d files (ulimit -n)",
                context.get("exception"),
                resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            )


class _Connection(web.RequestHandler):
    def __init__(
        self, open_connections: weakref.WeakSet[_Connection], server: web.Server, **options: Any
    ) -> None:
        super().__init__(server, **options)
        self._open_connections = open_connections
        self.is_half_closed = False
        self.socket_below_tls: asyncio.Transport | None = None
        # aiohttp counts from the end of the handshake.
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout

    def eof_received(self) -> bool:  # type: ignore[override] # asyncio wants to know
        """Keep a connection whose client has closed its sending side until it is answered."""
        if self.is_idle or self.ssl_context is not None:  # TLS cannot be half closed
            return False
        self.close()  # once the request is answered
        self.is_half_closed = True
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
        text = f"the request is no valid HTTP: {message}"
        response = error_response(RequestError(text, status=status, code="invalid_http"))
        response.force_close()
        return response

    @property
    def is_idle(self) -> bool:
        """Tell whether no request is there, nor being answered; also before the TLS handshake."""
        if self._task_handler is None:
            return True
        return self._waiter is not None and not self._waiter.done()

    def idle_until_at(self) -> float:
        """Return the instant at which aiohttp would close it."""
        return self._next_keepalive_close_time

    def drop(self) -> None:
        """Close it at any time; what was written is still sent."""
        self.force_close()
        below = self.socket_below_tls
        # TLS would wait for the handshake, or for the peer to say that it closes, too.
        if below is not None and not below.get_write_buffer_size():
            below.abort()


class _Tls(asyncio.sslproto.SSLProtocol):
    """Tells a connection of its socket before the handshake, and of handshakes that fail."""

    def __init__(self, connection: _Connection, context: ssl.SSLContext) -> None:
        super().__init__(
            connection._loop,
            connection,
            context,
            None,  # type: ignore[arg-type] # nobody waits for the handshake
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
        # asyncio does so only after a handshake; the second call does nothing.
        self._loop.call_soon(self._connection.connection_lost, exc)


async def _refuse(_: web.BaseRequest) -> web.StreamResponse:
    message = "all connections of this server are busy"
    response = error_response(OverloadedError(message, status=503, code="too_many_connections"))
    response.force_close()
    return response


def must_end(http: web.BaseRequest) -> bool:
    """Return True if the client has closed its sending side: it may have left. GETs end anyway."""
    is_half_closed = isinstance(http.protocol, _Connection) and http.protocol.is_half_closed
    return is_half_closed and http.method not in ("GET", "HEAD")


def fit(wanted: int, *, num_each: int = 1, num_others: int = 0) -> int:
    """Return how many connections fit, at most ``wanted``, at ``num_each`` descriptors each."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (limit - RESERVED_DESCRIPTORS - num_others) // num_each))
