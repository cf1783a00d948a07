"""Builds the web application of an HTTP process. Each request passes the guard and the key check;
each error becomes an answer.

::

    request ── id ── guard ── key ── handler ──> answer
                └──────┴───────┴────────┴─────> error in OpenAI's form, counted, with the id
"""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from pdlaunch import __version__
from pdlaunch.config.http_names import ANY, WILDCARDS, is_loopback
from pdlaunch.errors import RequestError
from pdlaunch.http.connections import must_end
from pdlaunch.http.errors import (
    CLIENT_CLOSED_REQUEST,
    error_response,
    is_poll,
    json_response,
    model_not_found,
)
from pdlaunch.http.headers import REQUEST_ID_HEADER, read_request_id
from pdlaunch.http.sse import STREAM, ClientStream
from pdlaunch.observe.logs import request_logging
from pdlaunch.observe.metrics import RequestMetrics
from pdlaunch.protocol.ids import HttpRequestId
from pdlaunch.protocol.openai.responses import ModelCard, ModelList

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
KeyCheck = Callable[[web.Request], None]  # raises RequestError for a request without the key
End = Callable[[int, BaseException | None], None]
# Called before any check. The returned function is called at the end with the status (499: the
# client went away) and the error that the client was sent, if any.
Watch = Callable[[web.Request, HttpRequestId], End]

_REQUEST_ID = web.RequestKey("request_id", str)
# Load balancers send arbitrary Host headers to these, and the answers are not secret.
HOST_FREE_PATHS = frozenset({"/health", "/ping"})


class AppRoute(NamedTuple):
    method: str  # ``*`` stands for all methods
    path: str
    handler: Handler
    check_key: KeyCheck | None = None  # None: the check of the application


class Guard:
    """Refuses requests to one server that a foreign web page may have sent.

    A browser lets any page send requests to ``127.0.0.1``. A page whose own host name resolves to
    this address (DNS rebinding) can read the answers, too. Checks before that of the key:

    - **Host** must be a loopback name or address, the local address of the connection, the address
      to listen on, or one of ``allowed_hosts``. A page with DNS rebinding sends its own name.
    - **Origin**, which browsers add to requests to other sites, must be the server's own.
    - **Content-Type** of a body must be ``application/json``: browsers let pages send a few other
      types without a preflight request.
    """

    def __init__(self, bind_host: str, *, allowed_hosts: tuple[str, ...] = ()) -> None:
        own = {bind_host, socket.gethostname()} if bind_host in WILDCARDS else {bind_host}
        self._hosts = frozenset(_plain(name) for name in {"localhost", *own, *allowed_hosts} - {""})
        self._any_host = ANY in allowed_hosts

    def check(self, http: web.Request) -> None:
        """Raise RequestError for a request that a foreign web page may have sent."""
        if not self._is_own_host(http):
            shown = ", ".join(http.headers.getall(hdrs.HOST, []))[:200]
            message = (
                f"Host {shown!r} is not a known name of this server; if clients should use it, "
                "add it to the setting allowed_hosts"
            )
            raise RequestError(message, status=421, code="host_not_allowed")
        if hdrs.ORIGIN in http.headers and not _is_same_origin(http):
            message = (
                f"pages of origin {http.headers[hdrs.ORIGIN][:200]!r} may not use this server; to "
                "allow them, use a proxy that handles CORS and removes the header Origin"
            )
            raise RequestError(message, status=403, code="origin_not_allowed")
        if http.body_exists and http.content_type != "application/json":
            raise RequestError(
                "Content-Type must be application/json", status=415, code="unsupported_media_type"
            )
        encoding = http.headers.get(hdrs.CONTENT_ENCODING, "identity")
        if encoding.lower() != "identity":
            # Limits count received bytes; decompressed, a body may be a thousand times larger.
            message = (
                f"Content-Encoding {encoding[:100]!r} is not supported; send the body as it is"
            )
            raise RequestError(message, status=415, code="unsupported_encoding")

    def _is_own_host(self, http: web.Request) -> bool:
        if self._any_host or http.path in HOST_FREE_PATHS:
            return True
        # Refuse two Host headers: servers disagree on which of them counts.
        given = http.headers.getall(hdrs.HOST, [])
        host = _host_name(given[0]) if len(given) == 1 else ""
        name = None if http.transport is None else http.transport.get_extra_info("sockname")
        own_address = name[0].partition("%")[0] if isinstance(name, tuple) else None
        return host in self._hosts or is_loopback(host) or host == own_address


@dataclass(eq=False)
class HttpApp:
    """Builds the ``web.Application`` of a process from its table of routes."""

    routes: Sequence[AppRoute]
    _: KW_ONLY
    guard: Guard
    check_key: KeyCheck | None  # None: clients need no key
    open_paths: Collection[str] = ()  # these never need one
    metrics: RequestMetrics
    max_body_bytes: int
    # A request for which it returns True skips the guard and the key check.
    is_trusted: Callable[[web.Request], bool] = lambda _: False
    watch: Watch | None = None  # called for each POST of a client, except health checks, commands

    def __post_init__(self) -> None:
        self._no_route = AppRoute("*", "", self._unknown)
        self.app = web.Application(
            client_max_size=self.max_body_bytes, middlewares=[self._catch_unknown]
        )
        for route in (*self.routes, AppRoute("GET", "/version", _version)):
            handler = partial(self._at_the_door, route)
            if route.method == "GET":
                self.app.router.add_get(route.path, handler)  # answers HEAD too
            else:
                self.app.router.add_route(route.method, route.path, handler)

    @web.middleware
    async def _catch_unknown(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check requests without a route, too. A catch-all route would miss ``OPTIONS *``."""
        if request.match_info.http_exception is None:
            return await handler(request)
        return await self._at_the_door(self._no_route, request)

    async def _at_the_door(self, route: AppRoute, http: web.Request) -> web.StreamResponse:
        id_error: RequestError | None = None
        try:
            request_id = read_request_id(http.headers.get(REQUEST_ID_HEADER))
        except RequestError as error:
            request_id, id_error = read_request_id(None), error
        http[_REQUEST_ID] = request_id
        end: End | None = None
        # Routes of commands have their own key check.
        is_clients = http.method == "POST" and route.check_key is None and route.path != "/ping"
        if self.watch is not None and is_clients:
            end = self.watch(http, request_id)
        status = CLIENT_CLOSED_REQUEST
        told: Exception | None = None
        with request_logging(request_id):
            try:
                if id_error is not None:
                    raise id_error
                self._check(route, http)
                if must_end(http):
                    raise asyncio.CancelledError
                response = await route.handler(http)
                status = response.status
            except asyncio.CancelledError:
                # The client has closed its connection, or this process is ending.
                self.metrics.failed(CLIENT_CLOSED_REQUEST)
                if not must_end(http):
                    raise
                response = await _refuse_half_closed(http)
            except ConnectionError:
                self.metrics.failed(CLIENT_CLOSED_REQUEST)
                return web.Response(status=CLIENT_CLOSED_REQUEST)
            except Exception as error:
                response = error_response(error)
                status, told = response.status, error
                # Views, commands, unknown paths and polls during a start do not count.
                is_counted = route is not self._no_route and not is_poll(error)
                if is_counted and not http.path.startswith("/pdlaunch/"):
                    self.metrics.failed(status)
            finally:
                if end is not None:
                    end(status, told)
                told = id_error = None  # Tracebacks refer to this frame: cycles would keep bodies.
                http.pop(STREAM, None)  # It refers to the request: another cycle.
        # A stream has already sent its headers, including the id.
        if not response.prepared:
            response.headers[REQUEST_ID_HEADER] = request_id
        return response

    def _check(self, route: AppRoute, http: web.Request) -> None:
        if self.is_trusted(http):
            return
        self.guard.check(http)
        own = None if http.path in self.open_paths else self.check_key
        if (check_key := route.check_key or own) is not None:
            check_key(http)

    async def _unknown(self, http: web.Request) -> web.StreamResponse:
        error = http.match_info.http_exception
        if not isinstance(error, web.HTTPMethodNotAllowed):
            raise RequestError(f"there is no path {http.path[:200]}", status=404, code="not_found")
        methods = ", ".join(sorted(error.allowed_methods))
        message = f"{http.path[:200]} takes {methods}, not {http.method}"
        response = error_response(RequestError(message, status=405, code="method_not_allowed"))
        response.headers["Allow"] = methods
        return response


async def _refuse_half_closed(http: web.Request) -> web.StreamResponse:
    error = RequestError(
        "the client closed its sending side of the connection, so the request was cancelled; keep "
        "the connection open until the answer has arrived",
        code="connection_half_closed",
    )
    stream: ClientStream | None = http.get(STREAM)
    if stream is not None and stream.has_begun:
        with contextlib.suppress(ConnectionError):
            await stream.fail(error)
        return stream.response
    if http.writer.output_size > 0:
        raise asyncio.CancelledError
    return error_response(error)


async def _version(_: web.Request) -> web.StreamResponse:
    return json_response({"version": __version__})


def request_id_of(http: web.Request) -> HttpRequestId:
    """Return the id of the request, from its header or generated by ``HttpApp``."""
    return HttpRequestId(http[_REQUEST_ID])


def bearer_check(keys: Collection[str], *, message: str, code: str) -> KeyCheck:
    """Return a check that the request has one of ``keys`` as its bearer token."""

    def check(http: web.Request) -> None:
        sent = bearer_token(http)
        # Compare all keys in constant time, so that timing reveals nothing about a near match.
        matches = [secrets.compare_digest(sent, key.encode()) for key in keys]
        if not any(matches):
            raise RequestError(message, status=401, code=code)

    return check


def bearer_token(http: web.Request) -> bytes:
    """Return the key that the client sent; empty, which is never a valid key, if it sent none."""
    scheme, _, given = http.headers.get("Authorization", "").partition(" ")
    return given.strip().encode(errors="surrogateescape") if scheme.lower() == "bearer" else b""


def model_routes(cards: Callable[[], list[ModelCard]]) -> list[AppRoute]:
    """Return the routes of /v1/models. The first of the cards must be that of the base model."""

    async def models(_: web.Request) -> web.StreamResponse:
        return json_response(ModelList(data=cards()))

    async def model(http: web.Request) -> web.StreamResponse:
        served, name = cards(), http.match_info["name"]
        for card in served:
            if card.id == name:
                return json_response(card)
        raise model_not_found(name, served[0].id)

    return [
        AppRoute("GET", "/v1/models", models),
        AppRoute("GET", "/v1/models/{name:.+}", model),
    ]


def health_routes(health: Handler) -> list[AppRoute]:
    """Return the routes of health checks: /health for load balancers, /ping for SageMaker."""
    return [
        AppRoute(method, path, health)
        for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping"))
    ]


def _is_same_origin(http: web.Request) -> bool:
    """Compare host and port only: behind a TLS proxy, the server does not know the scheme."""
    origins, hosts = http.headers.getall(hdrs.ORIGIN), http.headers.getall(hdrs.HOST, [])
    try:
        places = [urlsplit(origin).netloc.lower() for origin in origins]
    except ValueError:
        return False
    return len(places) == 1 and places == [host.lower() for host in hosts]


def _host_name(host_header: str) -> str:
    """Return the name in a Host header, ``::1`` for ``[::1]:8000``; empty if it is malformed."""
    try:
        parts = urlsplit(f"//{host_header}")
        _ = parts.port  # raises ValueError if the port is invalid
    except ValueError:
        return ""
    is_plain = parts.netloc == host_header and "@" not in host_header
    return _plain(parts.hostname or "") if is_plain else ""


def _plain(name: str) -> str:
    return name.strip("[]").rstrip(".").lower()
