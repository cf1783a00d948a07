"""Builds the HTTP application of one engine, and answers what does not generate."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from pdlaunch.engine.server.engine_service import EngineService
from pdlaunch.engine.server.generate import generate
from pdlaunch.engine.server.served_model import ServedModel
from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.app import (
    AppRoute,
    HttpApp,
    bearer_check,
    health_routes,
    model_routes,
)
from pdlaunch.http.errors import json_response
from pdlaunch.http.guard import Guard
from pdlaunch.http.limits import LARGE_TEXT_BYTES
from pdlaunch.observe.metrics import METRICS_CONTENT_TYPE, render_metrics
from pdlaunch.protocol.engine import CheckIntegrity
from pdlaunch.protocol.ids import HopId
from pdlaunch.protocol.openai.body import read_json_object
from pdlaunch.protocol.openai.requests import ChatCompletionRequest, CompletionRequest
from pdlaunch.protocol.openai.responses import ModelCard

RANK_CHECK_TIMEOUT_S = 30.0
OPEN_PATHS = ("/health", "/ping")  # need no key

Endpoint = Callable[[EngineService, web.Request], Awaitable[web.StreamResponse]]


def make_app(service: EngineService, *, keys: Collection[str]) -> web.Application:
    """Return the application; one of ``keys`` must be sent as bearer, except to ``OPEN_PATHS``."""
    spec = service.spec

    def route(method: str, path: str, endpoint: Endpoint) -> AppRoute:
        return AppRoute(method, path, partial(endpoint, service))

    card = ModelCard(
        id=spec.served_model_name, root=spec.model_dir, max_model_len=spec.max_model_len
    )
    routes = [
        route("POST", "/v1/completions", partial(generate, kind=CompletionRequest)),
        route("POST", "/v1/chat/completions", partial(generate, kind=ChatCompletionRequest)),
        *model_routes(lambda: [card]),
        route("POST", "/tokenize", partial(_convert, convert=ServedModel.tokenize)),
        route("POST", "/detokenize", partial(_convert, convert=ServedModel.detokenize)),
        *health_routes(partial(_health, service)),
        route("GET", "/metrics", _metrics),
        route("POST", "/pdlaunch/release", _release),
        route("GET", "/pdlaunch/spans", _spans),
        route("GET", "/pdlaunch/integrity", _integrity),
        route("POST", "/sleep", _sleep),
        route("POST", "/wake_up", _wake_up),
        route("GET", "/is_sleeping", _is_sleeping),
    ]
    return HttpApp(
        [_counted(each, service) for each in routes],
        guard=Guard(
            spec.bind_address,
            allowed_hosts=(*spec.allowed_hosts, spec.advertise_address),
            cors_origins=spec.cors_origins,
        ),
        check_key=bearer_check(
            keys,
            message="engines take requests from the launch's router; others send engine_api_key as "
            "bearer, where it is set",
            code="invalid_api_key",
        ),
        open_paths=OPEN_PATHS,
        metrics=service.metrics.requests,
        max_body_bytes=service.max_body_bytes,
    ).app


def _counted(route: AppRoute, service: EngineService) -> AppRoute:
    async def handle(http: web.Request) -> web.StreamResponse:
        with service.metrics.requests.in_flight.track_inprogress():
            return await route.handler(http)

    return route._replace(handler=handle)


async def _convert(
    service: EngineService,
    http: web.Request,
    convert: Callable[[ServedModel, bytes], tuple[dict[str, Any], tuple[str, ...]]],
) -> web.Response:
    """Convert text to token ids or back; it takes a place as a request that generates does."""
    with service.admission.admit():
        async with service.deadlines.start().guard(), service.bodies.read(http) as raw:
            answer, ignored_fields = await service.inputs.run(
                len(raw) >= LARGE_TEXT_BYTES, partial(convert, service.model, raw)
            )
            body = msgspec.json.encode(answer)
    headers = service.ignored_fields.headers(ignored_fields)
    return web.Response(body=body, content_type="application/json", headers=headers)


async def _health(service: EngineService, _: web.Request) -> web.Response:
    service.check_health()
    return json_response({"status": "ok"})


async def _metrics(service: EngineService, _: web.Request) -> web.Response:
    await service.read_stats()
    return web.Response(
        body=render_metrics(service.metrics.registry),
        headers={"Content-Type": METRICS_CONTENT_TYPE},
    )


async def _spans(service: EngineService, http: web.Request) -> web.Response:
    report = await service.take_spans(HopId(http.query.get("request_id", "")))
    if report is None:
        raise RequestError("no spans are kept of this request", param="request_id", status=404)
    return json_response(report)


async def _release(service: EngineService, http: web.Request) -> web.Response:
    """End the lease of a remote prefill, named by the hop's id or by its remote_request_id."""
    async with service.bodies.read(http) as raw:
        name = read_json_object(raw).get("request_id")
    if not isinstance(name, str):
        raise RequestError("request_id must be a string", param="request_id")
    request_id = service.leases.pop(name, None)
    if request_id is not None:
        service.link.abort(request_id)
    return json_response({"released": request_id is not None})


async def _integrity(service: EngineService, _: web.Request) -> web.Response:
    """Have rank 0 prove who owns each KV block; the answer is 200 also where that fails."""
    try:
        async with asyncio.timeout(RANK_CHECK_TIMEOUT_S):
            report = await service.link.call(lambda call_id: CheckIntegrity(call_id=call_id))
    except TimeoutError:
        raise OverloadedError(
            "rank 0 did not answer in time", status=503, code="engine_stalled"
        ) from None
    stats = msgspec.structs.asdict(report.stats)
    return json_response({"ok": report.error is None, "error": report.error, "stats": stats})


async def _sleep(service: EngineService, http: web.Request) -> web.Response:
    return json_response(await service.sleep.fall_asleep(http.query))


async def _wake_up(service: EngineService, http: web.Request) -> web.Response:
    return json_response(await service.sleep.wake_up(http.query))


async def _is_sleeping(service: EngineService, _: web.Request) -> web.Response:
    return json_response(service.sleep.status())
