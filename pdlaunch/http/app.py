"""Builds the web application of an HTTP process. Each request passes the guard and the key check;
each error becomes an answer.

::

    request ── id ── guard ── key ── handler ──> answer
                └──────┴───────┴────────┴─────> error in OpenAI's form, counted, with the id
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import NamedTuple

from aiohttp import web

from pdlaunch import __version__
from pdlaunch.errors import RequestError
from pdlaunch.http.connections import must_end
from pdlaunch.http.errors import (
    CLIENT_CLOSED_REQUEST,
    error_response,
    is_poll,
    json_response,
    model_not_found,
)
from pdlaunch.http.guard import Guard
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


class AppRoute(NamedTuple):
    method: str  # ``*`` stands for all methods
    path: str
    handler: Handler
    check_key: KeyCheck | None = None  # None: the check of the application


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
                told = None  # Its traceback refers to this frame: the cycle would keep the body.
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
