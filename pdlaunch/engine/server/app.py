"""Builds the HTTP application of one engine, and answers what does not generate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from functools import partial

import msgspec
from aiohttp import web

from pdlaunch.engine.server.engine_service import EngineService
from pdlaunch.engine.server.generate import GenerateHandler
from pdlaunch.engine.server.prompts import Converted, detokenize, tokenize
from pdlaunch.engine.server.served_model import ServedModel
from pdlaunch.engine.server.sleep import read_sleep_query, read_tags
from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.app import (
    CHAT_OPERATION,
    COMPLETIONS_OPERATION,
    DETOKENIZE_OPERATION,
    METRICS_OPERATION,
    TOKENIZE_OPERATION,
    AppRoute,
    Description,
    HttpApp,
    bearer_check,
    health_routes,
    model_routes,
)
from pdlaunch.http.errors import json_response
from pdlaunch.http.guard import Guard
from pdlaunch.http.limits import LARGE_TEXT_BYTES
from pdlaunch.http.openapi import Operation
from pdlaunch.observe.metrics import METRICS_CONTENT_TYPE, render_metrics
from pdlaunch.protocol.ids import HopId
from pdlaunch.protocol.openai.body import read_json_object
from pdlaunch.protocol.openai.responses import ModelCard

RANK_CHECK_TIMEOUT_S = 30.0
OPEN_PATHS = ("/health", "/ping")
"""Need no key."""


def make_app(service: EngineService, *, keys: Collection[str]) -> web.Application:
    """Return the application; one of ``keys`` must be sent as bearer, except to ``OPEN_PATHS``."""
    spec = service.spec
    endpoints = _Endpoints(service)
    generate = GenerateHandler(service)
    routes = [
        AppRoute("POST", "/v1/completions", generate.completions, None, COMPLETIONS_OPERATION),
        AppRoute("POST", "/v1/chat/completions", generate.chat, None, CHAT_OPERATION),
        *model_routes(lambda: [endpoints.card()]),
        AppRoute("POST", "/tokenize", endpoints.tokenize, None, TOKENIZE_OPERATION),
        AppRoute("POST", "/detokenize", endpoints.detokenize, None, DETOKENIZE_OPERATION),
        *health_routes(endpoints.health),
        AppRoute("GET", "/metrics", endpoints.metrics, None, METRICS_OPERATION),
        *(
            AppRoute(method, path, handler, None, Operation(summary))
            for method, path, handler, summary in (
                ("POST", "/pdlaunch/release", endpoints.release, "End the lease of a request."),
                (
                    "POST",
                    "/pdlaunch/withdraw",
                    endpoints.withdraw,
                    "Take a prompt back that has not begun.",
                ),
                (
                    "GET",
                    "/pdlaunch/spans",
                    endpoints.spans,
                    "Tell the spans of a request whose answer nobody took.",
                ),
                ("GET", "/pdlaunch/integrity", endpoints.integrity, "Prove who owns each block."),
                ("POST", "/sleep", endpoints.sleep, "Put the engine to sleep."),
                ("POST", "/wake_up", endpoints.wake_up, "Wake the engine up."),
                ("GET", "/is_sleeping", endpoints.is_sleeping, "Say whether the engine sleeps."),
            )
        ),
    ]
    return HttpApp(
        [_counted(route, service) for route in routes],
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
            open_paths=OPEN_PATHS,
        ),
        description=Description(
            f"pdlaunch engine {spec.name}",
            public=False,
            strict_fields=spec.strict_fields,
            has_key=True,
            open_paths=OPEN_PATHS,
        ),
        metrics=service.metrics.requests,
        max_body_bytes=service.max_body_bytes,
    ).app


def _counted(route: AppRoute, service: EngineService) -> AppRoute:
    """Return the route with its requests counted as in flight."""

    async def handle(http: web.Request) -> web.StreamResponse:
        with service.metrics.requests.in_flight.track_inprogress():
            return await route.handler(http)

    return route._replace(handler=handle)


class _Endpoints:
    """Answers every request that does not generate."""

    def __init__(self, service: EngineService) -> None:
        self._service = service

    def card(self) -> ModelCard:
        spec = self._service.spec
        return ModelCard(
            id=spec.served_model_name, root=spec.model_dir, max_model_len=spec.max_model_len
        )

    async def tokenize(self, http: web.Request) -> web.Response:
        return await self._convert(http, tokenize)

    async def detokenize(self, http: web.Request) -> web.Response:
        return await self._convert(http, detokenize)

    async def _convert(
        self, http: web.Request, convert: Callable[[bytes, ServedModel, bool], Converted]
    ) -> web.Response:
        """Convert text to token ids or back; it takes a place as a request that generates does."""
        service = self._service
        with service.admission.admit():
            async with service.deadlines.start().guard(), service.read(http) as raw:
                converted = await service.inputs.run(
                    len(raw) >= LARGE_TEXT_BYTES,
                    partial(convert, raw, service.model, service.spec.strict_fields),
                )
        return web.Response(
            body=converted.answer,
            content_type="application/json",
            headers=service.ignored_fields.headers(converted.ignored_fields),
        )

    async def health(self, http: web.Request) -> web.Response:
        self._service.check_health()
        return json_response({"status": "ok"})

    async def metrics(self, http: web.Request) -> web.Response:
        await self._service.read_stats()
        return web.Response(
            body=render_metrics(self._service.metrics.registry),
            headers={"Content-Type": METRICS_CONTENT_TYPE},
        )

    async def withdraw(self, http: web.Request) -> web.Response:
        """Give a prompt up if nothing was computed for it; its own answer says whether.

        That is the error ``withdrawn``, or the answer as it would have been.
        """
        running = self._service.running.get(HopId(await self._read_name(http)))
        if running is not None:
            running.withdraw()
        return json_response({"found": running is not None})

    async def spans(self, http: web.Request) -> web.Response:
        """Tell, once, what was recorded of a request that was aborted."""
        report = await self._service.unsent_spans.take(HopId(http.query.get("request_id", "")))
        if report is None:
            raise RequestError("no spans are kept of this request", param="request_id", status=404)
        return json_response(report)

    async def release(self, http: web.Request) -> web.Response:
        """End the lease of a remote prefill, named by the hop's id or by its remote_request_id."""
        request_id = self._service.leases.take(await self._read_name(http))
        if request_id is not None:
            self._service.link.abort(request_id)
        return json_response({"released": request_id is not None})

    async def _read_name(self, http: web.Request) -> str:
        """Return the id that a body names. Raises RequestError."""
        async with self._service.read(http) as raw:
            name = read_json_object(raw).get("request_id")
        if not isinstance(name, str):
            raise RequestError("request_id must be a string", param="request_id")
        return name

    async def integrity(self, http: web.Request) -> web.Response:
        """Have rank 0 prove who owns each KV block.

        The answer is 200 with ``ok``, what is wrong in ``error``, and the counts of the moment.
        """
        try:
            async with asyncio.timeout(RANK_CHECK_TIMEOUT_S):
                report = await self._service.link.check_integrity()
        except TimeoutError:
            raise OverloadedError(
                "rank 0 did not answer in time", status=503, code="engine_stalled"
            ) from None
        stats = msgspec.structs.asdict(report.stats)
        return json_response({"ok": report.error is None, "error": report.error, "stats": stats})

    async def sleep(self, http: web.Request) -> web.Response:
        """Take ``level=1|2`` and ``mode=wait|refuse``; answer when the engine sleeps."""
        return json_response(await self._service.sleep.fall_asleep(read_sleep_query(http.query)))

    async def wake_up(self, http: web.Request) -> web.Response:
        """Take ``tags=weights&tags=kv_cache``, without them all pools.

        The answer comes when the engine serves again, or lacks nothing but the other tags.
        """
        return json_response(await self._service.sleep.wake_up(read_tags(http.query)))

    async def is_sleeping(self, http: web.Request) -> web.Response:
        return json_response(self._service.sleep.status())
