"""Builds the door of an HTTP process: each request passes the guard and the key check, and each
error becomes an answer.

::

    request ── id ── guard ── key ── handler ──> answer
                └──────┴───────┴────────┴─────> error in OpenAI's form, counted, with the id
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
from aiohttp import web
from pydantic.json_schema import models_json_schema

from pdlaunch import __version__
from pdlaunch.errors import RequestError
from pdlaunch.http.errors import (
    CLIENT_CLOSED_REQUEST,
    error_response,
    json_response,
    model_not_found,
)
from pdlaunch.http.guard import Guard
from pdlaunch.http.headers import REQUEST_ID_HEADER, read_request_id
from pdlaunch.observe.logs import request_logging
from pdlaunch.observe.metrics import RequestMetrics
from pdlaunch.protocol.ids import HttpRequestId
from pdlaunch.protocol.openai.body import INTERNAL_FIELDS, RequestBody
from pdlaunch.protocol.openai.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from pdlaunch.protocol.openai.responses import (
    ChatCompletion,
    Completion,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
KeyCheck = Callable[[web.Request], None]  # raises RequestError for a request without the key
End = Callable[[int, BaseException | None], None]
Watch = Callable[[web.Request, HttpRequestId], End]
"""Is called before anything is checked; what it returns, with the status of the answer, 499 if the
client went away, and the error that the client is told of.
"""


_REQUEST_ID = web.RequestKey("request_id", str)
_REFERENCE = "#/components/schemas/"
_PARAMETER = re.compile(r"\{(\w+)(:[^}]*)?\}")


class Operation(NamedTuple):
    """Describes what a route does, takes and answers."""

    summary: str
    requests: Sequence[type[RequestBody]] = ()
    """The body is one of these; without any there is none."""
    answer: type[msgspec.Struct] | None = None  # none: JSON of a form that is not described
    chunk: type[msgspec.Struct] | None = None
    """The data of each event but the last one, ``[DONE]``, where the route can stream."""
    content_type: str = "application/json"


class AppRoute(NamedTuple):
    """Describes one route of an application."""

    method: str  # ``*`` stands for all methods
    path: str
    handler: Handler
    operation: Operation | str = ""
    """What it does; a summary is enough where it takes and answers nothing that is described."""
    check_key: KeyCheck | None = None  # none: the application's own check

    @property
    def described(self) -> Operation:
        return (
            self.operation if isinstance(self.operation, Operation) else Operation(self.operation)
        )


class HttpApp:
    """Builds the ``web.Application`` of a process from its table of routes.

    ``check_key``: None where clients need no key; nobody needs one for ``open_paths``. A request
    that ``is_trusted`` needs no key, and comes from no web page. ``watch`` sees each POST of a
    client, but no health checks and no commands. ``is_public``: /openapi.json, under ``title``, is
    for clients and leaves out what routers alone may send.
    """

    def __init__(
        self,
        routes: Sequence[AppRoute],
        *,
        guard: Guard,
        check_key: KeyCheck | None,
        open_paths: Collection[str] = (),
        metrics: RequestMetrics,
        max_body_bytes: int,
        title: str,
        is_public: bool = False,
        is_trusted: Callable[[web.Request], bool] = lambda _: False,
        watch: Watch | None = None,
    ) -> None:
        self._guard = guard
        self._watch = watch
        self._check_key = check_key
        self._metrics = metrics
        self._is_trusted = is_trusted
        self._open_paths = open_paths
        self._title = title
        self._is_public = is_public
        # Made when it is first asked for, once: it takes up to 0.1 s.
        self._document: bytes | None = None
        self._routes = [
            *routes,
            AppRoute("GET", "/version", _version, "Return pdlaunch's version."),
            AppRoute("GET", "/openapi.json", self._openapi, "Describe all routes."),
        ]
        self._no_route = AppRoute("*", "", self._unknown)
        self.app = web.Application(
            client_max_size=max_body_bytes, middlewares=[self._catch_unknown]
        )
        self.app.on_response_prepare.append(guard.add_cors_headers)
        for route in self._routes:
            handler = partial(self._at_the_door, route)
            if route.method == "GET":
                self.app.router.add_get(route.path, handler)  # answers HEAD too
            else:
                self.app.router.add_route(route.method, route.path, handler)

    @web.middleware
    async def _catch_unknown(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Have 404 and 405 pass the door, too; no route could, as ``OPTIONS *`` has no path."""
        if request.match_info.http_exception is None:
            return await handler(request)
        return await self._at_the_door(self._no_route, request)

    async def _at_the_door(self, route: AppRoute, http: web.Request) -> web.StreamResponse:
        request_id, id_error = _read_id(http)
        http[_REQUEST_ID] = request_id
        end: End | None = None
        if self._watch is not None and _is_watched(route, http):
            end = self._watch(http, request_id)
        status = CLIENT_CLOSED_REQUEST
        told: Exception | None = None
        with request_logging(request_id):
            try:
                if id_error is not None:
                    raise id_error
                response = self._answer_at_once(route, http) or await route.handler(http)
                status = response.status
            except asyncio.CancelledError:
                # The client has closed its connection, or this process leaves.
                self._metrics.failed(CLIENT_CLOSED_REQUEST)
                raise
            except ConnectionError:
                self._metrics.failed(CLIENT_CLOSED_REQUEST)
                return web.Response(status=CLIENT_CLOSED_REQUEST)
            except Exception as error:
                response = error_response(error)
                status, told = response.status, error
                # To look at a deployment, or to command it, is no request of a client.
                if not http.path.startswith("/pdlaunch/"):
                    self._metrics.failed(status)
            finally:
                if end is not None:
                    end(status, told)
                told = None  # Its traceback holds this frame: a cycle would keep the body.
        # A stream has sent its headers already, with the id among them.
        if not response.prepared:
            response.headers[REQUEST_ID_HEADER] = request_id
        return response

    def _answer_at_once(self, route: AppRoute, http: web.Request) -> web.Response | None:
        """Return the answer to a preflight, None for what the handler has to answer."""
        if self._is_trusted(http):
            return None
        answer = self._guard.admit(http)
        if answer is None and (check_key := self._key_check(route, http.path)) is not None:
            check_key(http)
        return answer

    def _key_check(self, route: AppRoute, path: str) -> KeyCheck | None:
        return route.check_key or (None if path in self._open_paths else self._check_key)

    async def _openapi(self, _: web.Request) -> web.StreamResponse:
        if self._document is None:
            self._document = msgspec.json.encode(self._describe())
        return web.Response(body=self._document, content_type="application/json")

    def _describe(self) -> dict[str, Any]:
        """Return the OpenAPI document, with pydantic's and msgspec's schemas."""
        operations = [route.described for route in self._routes]
        requests = {kind for each in operations for kind in each.requests}
        answers = [kind for each in operations for kind in (each.answer, each.chunk) if kind]
        paths: dict[str, Any] = {}
        for route in self._routes:
            place = paths.setdefault(_PARAMETER.sub(r"{\1}", route.path), {})
            for method in ("get", "post") if route.method == "*" else (route.method.lower(),):
                place[method] = _describe_route(route)
                if self._check_key is not None and route.path not in self._open_paths:
                    place[method]["security"] = [{"key": []}]
        ordered = sorted(requests, key=lambda kind: kind.__name__)
        _, schemas = models_json_schema(
            [(kind, "validation") for kind in ordered], ref_template=_REFERENCE + "{model}"
        )
        components: dict[str, Any] = schemas.get("$defs", {})
        for schema in components.values():
            for name in INTERNAL_FIELDS if self._is_public else ():
                schema.get("properties", {}).pop(name, None)
        _, described = msgspec.json.schema_components(answers, ref_template=_REFERENCE + "{name}")
        return {
            "openapi": "3.1.0",
            "info": {"title": self._title, "version": __version__},
            "paths": paths,
            "components": {
                "schemas": components | described,
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
        }

    async def _unknown(self, http: web.Request) -> web.StreamResponse:
        error = http.match_info.http_exception
        if not isinstance(error, web.HTTPMethodNotAllowed):
            raise RequestError(f"there is no {http.path[:200]}", status=404, code="not_found")
        methods = ", ".join(sorted(error.allowed_methods))
        message = f"{http.path[:200]} takes {methods}, not {http.method}"
        response = error_response(RequestError(message, status=405, code="method_not_allowed"))
        response.headers["Allow"] = methods
        self._metrics.failed(response.status)
        return response


async def _version(_: web.Request) -> web.StreamResponse:
    return json_response({"version": __version__})


def request_id_of(http: web.Request) -> HttpRequestId:
    """Return the id that the door has given the request, or its client."""
    return HttpRequestId(http[_REQUEST_ID])


def bearer_check(keys: Collection[str], *, message: str, code: str) -> KeyCheck:
    """Return a check that one of ``keys`` was sent as bearer token."""

    def check(http: web.Request) -> None:
        if not has_bearer(http, keys):
            raise RequestError(message, status=401, code=code)

    return check


def has_bearer(http: web.Request, keys: Collection[str]) -> bool:
    """Tell whether the Authorization header carries one of ``keys``."""
    scheme, _, given = http.headers.get("Authorization", "").partition(" ")
    sent = given.strip().encode(errors="surrogateescape")
    # All are compared, in constant time, so that the time does not tell which one nearly matched.
    matches = [secrets.compare_digest(sent, key.encode()) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


def model_routes(cards: Callable[[], list[ModelCard]]) -> list[AppRoute]:
    """Return the routes of /v1/models; the first card is that of the model itself."""

    async def models(_: web.Request) -> web.StreamResponse:
        return json_response(ModelList(data=cards()))

    async def model(http: web.Request) -> web.StreamResponse:
        served, name = cards(), http.match_info["name"]
        for card in served:
            if card.id == name:
                return json_response(card)
        raise model_not_found(name, served[0].id)

    return [
        AppRoute("GET", "/v1/models", models, Operation("List the model.", answer=ModelList)),
        AppRoute(
            "GET",
            "/v1/models/{name:.+}",
            model,
            Operation("Describe the model of this name.", answer=ModelCard),
        ),
    ]


COMPLETIONS_OPERATION = Operation(
    "Complete prompts, whole or as a stream.", [CompletionRequest], Completion, Completion
)
CHAT_OPERATION = Operation(
    "Answer a chat, whole or as a stream.", [ChatCompletionRequest], ChatCompletion, ChatCompletion
)
TOKENIZE_OPERATION = Operation(
    "Return the token ids of a text or of a chat.",
    [TokenizeCompletionRequest, TokenizeChatRequest],
    TokenizeResponse,
)
DETOKENIZE_OPERATION = Operation(
    "Return the text of token ids.", [DetokenizeRequest], DetokenizeResponse
)
METRICS_OPERATION = Operation("Return metrics in Prometheus's form.", content_type="text/plain")


def health_routes(health: Handler) -> list[AppRoute]:
    """Return the routes by which load balancers, and SageMaker with /ping, ask for the health."""
    return [
        AppRoute(method, path, health, "Answer 200 while requests are taken.")
        for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping"))
    ]


def _is_watched(route: AppRoute, http: web.Request) -> bool:
    """Tell whether a client wants something done: commands have a key of their own."""
    return http.method == "POST" and route.check_key is None and route.path != "/ping"


def _read_id(http: web.Request) -> tuple[HttpRequestId, RequestError | None]:
    """Return a new id for a request that is refused, as its own cannot be sent back."""
    try:
        return read_request_id(http.headers.get(REQUEST_ID_HEADER)), None
    except RequestError as error:
        return read_request_id(None), error


def _describe_route(route: AppRoute) -> dict[str, Any]:
    operation = route.described
    is_json = operation.content_type == "application/json"

    def reference(kind: type | None) -> dict[str, str]:
        if kind is None:
            return {"type": "object" if is_json else "string"}
        return {"$ref": _REFERENCE + kind.__name__}

    content: dict[str, Any] = {operation.content_type: {"schema": reference(operation.answer)}}
    if operation.chunk is not None:
        content["text/event-stream"] = {"schema": reference(operation.chunk)}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "The answer.", "content": content}},
    }
    if names := _PARAMETER.findall(route.path):
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name, _ in names
        ]
    if operation.requests:
        schema = {"anyOf": [reference(kind) for kind in operation.requests]}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        described["requestBody"] = body
    return described
