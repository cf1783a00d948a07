"""The HTTP application of one engine: routes, errors, authentication."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from pdlaunch.errors import OverloadedError, PdlaunchError, RequestError
from pdlaunch.http.bearer import has_bearer
from pdlaunch.http.guard import Guard
from pdlaunch.http.large_inputs import LARGE_TEXT_BYTES
from pdlaunch.observe.logs import request_logging
from pdlaunch.observe.metrics import METRICS_CONTENT_TYPE, render_metrics
from pdlaunch.observe.trace import (
    ORIGIN_HEADER,
    REQUEST_ID_HEADER,
    TRACEPARENT_HEADER,
    read_origin,
    read_request_id,
    read_traceparent,
)
from pdlaunch.protocol.ids import HopId, PromptOrigin
from pdlaunch.protocol.openai.body import read_json_object
from pdlaunch.protocol.openai.errors import error_body, error_headers, error_status, model_not_found
from pdlaunch.protocol.openai.responses import ModelCard, ModelList
from pdlaunch.server.deadline import Deadline
from pdlaunch.server.engine_service import EngineService
from pdlaunch.server.generate import GenerateHandler
from pdlaunch.server.prepare import Call
from pdlaunch.server.served_model import ServedModel
from pdlaunch.server.sleep import read_sleep_query, read_tags
from pdlaunch.server.tokenize import detokenize, tokenize

_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CallHandler = Callable[[web.Request, Call], Awaitable[web.StreamResponse]]

CLIENT_CLOSED_REQUEST = 499
INTEGRITY_TIMEOUT_S = 30.0
_OPEN_PATHS = frozenset({"/health"})


def make_app(service: EngineService, *, keys: Collection[str]) -> web.Application:
    """All routes. ``keys``: one of them must be sent as bearer, except to /health; the guard looks
    before.
    """
    spec = service.spec
    guard = Guard(
        spec.bind_address, allowed_hosts=spec.allowed_hosts, cors_origins=spec.cors_origins
    )
    endpoints = _Endpoints(service)
    generate = GenerateHandler(service)
    app = web.Application(
        client_max_size=service.max_body_bytes,
        middlewares=[_answer_errors(service), _admit(guard), _authenticate(keys)],
    )
    app.on_response_prepare.append(guard.add_cors_headers)
    app.add_routes(
        [
            web.post("/v1/completions", _with_call(generate.completions)),
            web.post("/v1/chat/completions", _with_call(generate.chat)),
            web.get("/v1/models", endpoints.models),
            web.get("/v1/models/{name:.+}", endpoints.model),
            web.post("/tokenize", endpoints.tokenize),
            web.post("/detokenize", endpoints.detokenize),
            web.get("/health", endpoints.health),
            web.get("/metrics", endpoints.metrics),
            web.post("/pdlaunch/release", endpoints.release),
            web.get("/pdlaunch/integrity", endpoints.integrity),
            web.post("/sleep", endpoints.sleep),
            web.post("/wake_up", endpoints.wake_up),
            web.get("/is_sleeping", endpoints.is_sleeping),
        ]
    )
    return app


class _Endpoints:
    """Everything that does not generate."""

    def __init__(self, service: EngineService) -> None:
        self._service = service

    async def models(self, http: web.Request) -> web.Response:
        return _json(ModelList(data=[self._card()]))

    async def model(self, http: web.Request) -> web.Response:
        name = http.match_info["name"]
        if name != self._service.spec.served_model_name:
            raise model_not_found(name, self._service.spec.served_model_name)
        return _json(self._card())

    async def tokenize(self, http: web.Request) -> web.Response:
        return await self._convert(http, tokenize)

    async def detokenize(self, http: web.Request) -> web.Response:
        return await self._convert(http, detokenize)

    async def _convert(
        self, http: web.Request, convert: Callable[[bytes, ServedModel], bytes]
    ) -> web.Response:
        """Text to token ids or back; takes a place as requests that generate do."""
        service = self._service
        with service.admission.admit(even_asleep=True):
            async with (
                Deadline(service.spec.limits.request_timeout_s).guard(),
                service.read(http) as raw,
            ):
                answer = await service.inputs.run(
                    len(raw) >= LARGE_TEXT_BYTES, partial(convert, raw, service.model)
                )
        return web.Response(body=answer, content_type="application/json")

    async def health(self, http: web.Request) -> web.Response:
        self._service.check_health()
        return _json({"status": "ok"})

    async def metrics(self, http: web.Request) -> web.Response:
        return web.Response(
            body=render_metrics(self._service.metrics.registry),
            headers={"Content-Type": METRICS_CONTENT_TYPE},
        )

    async def release(self, http: web.Request) -> web.Response:
        """End the lease of a remote prefill, by the request's id or by its remote_request_id."""
        async with self._service.read(http) as raw:
            request_id = read_json_object(raw).get("request_id")
        if not isinstance(request_id, str):
            raise RequestError("request_id must be a string", param="request_id")
        rank_id = self._service.leases.take(request_id)
        if rank_id is not None:
            self._service.link.abort(rank_id)
        return _json({"released": rank_id is not None})

    async def integrity(self, http: web.Request) -> web.Response:
        """Who owns each KV block, proven by rank 0: 200 with ``ok``, what is wrong in ``error``,
        and the counts of the moment.
        """
        try:
            async with asyncio.timeout(INTEGRITY_TIMEOUT_S):
                report = await self._service.link.check_integrity()
        except TimeoutError:
            raise OverloadedError(
                "rank 0 did not answer in time", status=503, code="engine_stalled"
            ) from None
        stats = msgspec.structs.asdict(report.stats)
        return _json({"ok": report.error is None, "error": report.error, "stats": stats})

    async def sleep(self, http: web.Request) -> web.Response:
        """``level=1|2``, ``mode=wait|refuse``; answers when the engine sleeps."""
        return _json(await self._service.sleep.fall_asleep(read_sleep_query(http.query)))

    async def wake_up(self, http: web.Request) -> web.Response:
        """``tags=weights&tags=kv_cache``, all without; answers when the engine serves again, or
        still lacks the other tags.
        """
        return _json(await self._service.sleep.wake_up(read_tags(http.query)))

    async def is_sleeping(self, http: web.Request) -> web.Response:
        return _json(self._service.sleep.status())

    def _card(self) -> ModelCard:
        spec = self._service.spec
        return ModelCard(
            id=spec.served_model_name, root=spec.model_dir, max_model_len=spec.max_model_len
        )


def _with_call(handler: CallHandler) -> Handler:
    """Reads who calls: request id and trace context; the id is echoed whatever happens."""

    async def handle(http: web.Request) -> web.StreamResponse:
        hop_id = HopId(read_request_id(http.headers.get(REQUEST_ID_HEADER)))
        origin, is_suspect = read_origin(http.headers.get(ORIGIN_HEADER))
        call = Call(
            hop_id=hop_id,
            unique_id=f"{hop_id}-{secrets.token_hex(4)}",
            traceparent=read_traceparent(http.headers.get(TRACEPARENT_HEADER)),
            origin=PromptOrigin(origin),
            is_suspect=is_suspect,
        )
        with request_logging(hop_id):
            try:
                return await handler(http, call)
            except Exception as error:
                response = _failure(error)
                response.headers[REQUEST_ID_HEADER] = hop_id
                return response

    return handle


def _answer_errors(service: EngineService) -> Any:
    """Every error in OpenAI's form, and counted."""
    metrics = service.metrics.requests

    @web.middleware
    async def answer_errors(http: web.Request, handler: Handler) -> web.StreamResponse:
        with metrics.in_flight.track_inprogress():
            try:
                response = await handler(http)
            except asyncio.CancelledError:
                metrics.failed(CLIENT_CLOSED_REQUEST)
                raise
            except Exception as error:
                response = _failure(error)
            if response.status >= 400:
                metrics.failed(response.status)
            return response

    return answer_errors


def _failure(error: Exception) -> web.Response:
    match error:
        case PdlaunchError():
            return _error_response(error)
        case web.HTTPRequestEntityTooLarge():
            return _error_response(
                RequestError("the body is too large", status=413, code="body_too_large")
            )
        case web.HTTPException():
            refusal = _error_response(RequestError(error.reason, status=error.status))
            if isinstance(error, web.HTTPMethodNotAllowed):
                refusal.headers["Allow"] = error.headers["Allow"]
            return refusal
        case ConnectionError():
            # The client has gone: nobody reads this.
            return web.Response(status=CLIENT_CLOSED_REQUEST)
        case _:
            _log.exception("unexpected error", exc_info=error)
            return _error_response(error)


def _admit(guard: Guard) -> Any:
    @web.middleware
    async def admit(http: web.Request, handler: Handler) -> web.StreamResponse:
        return guard.admit(http) or await handler(http)

    return admit


def _authenticate(keys: Collection[str]) -> Any:
    @web.middleware
    async def authenticate(http: web.Request, handler: Handler) -> web.StreamResponse:
        if http.path not in _OPEN_PATHS and not has_bearer(http, keys):
            message = (
                "engines take requests from the launch's router; others send engine_api_key as "
                "bearer, where it is set"
            )
            raise RequestError(message, status=401, code="invalid_api_key")
        return await handler(http)

    return authenticate


def _error_response(error: BaseException) -> web.Response:
    return web.Response(
        status=error_status(error),
        body=msgspec.json.encode(error_body(error)),
        content_type="application/json",
        headers=error_headers(error),
    )


def _json(payload: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(payload), content_type="application/json")
