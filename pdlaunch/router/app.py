"""The public HTTP API of a deployment (aiohttp)."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from functools import partial

import msgspec
from aiohttp import web
from aiohttp.hdrs import METH_ANY

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.bearer import has_bearer
from pdlaunch.http.bodies import BodyBudget, Hold, read_body
from pdlaunch.http.guard import Guard
from pdlaunch.http.large_inputs import LARGE_BODY_BYTES, LargeInputs
from pdlaunch.observe.logs import request_logging
from pdlaunch.observe.metrics import METRICS_CONTENT_TYPE
from pdlaunch.observe.trace import (
    REQUEST_ID_HEADER,
    TRACEPARENT_HEADER,
    read_request_id,
    read_traceparent,
)
from pdlaunch.process.bootstrap import RouterSpec
from pdlaunch.protocol.ids import HopId, HttpRequestId
from pdlaunch.protocol.openai.errors import model_not_found
from pdlaunch.protocol.openai.responses import ModelCard, ModelList
from pdlaunch.router.admin import Admin, Handler
from pdlaunch.router.admin_socket import came_through_admin_socket
from pdlaunch.router.admission import Admission
from pdlaunch.router.answers import ClientStream, EventStream, StreamedAnswer, WholeAnswer
from pdlaunch.router.client_request import (
    CHAT,
    COMPLETIONS,
    ClientRequest,
    Endpoint,
    read_client_request,
)
from pdlaunch.router.deadline import Deadline
from pdlaunch.router.engine_client import EngineFailure
from pdlaunch.router.failures import error_event, error_response
from pdlaunch.router.generation import RETRY_AFTER_S, Generation, Sink
from pdlaunch.router.hops import Hops
from pdlaunch.router.idempotency import Repeats, Work, read_idempotency_key
from pdlaunch.router.pool import EngineKey
from pdlaunch.router.scrape import scrape
from pdlaunch.router.supervisor_link import SupervisorLink
from pdlaunch.router.transcript import Transcript

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 1.0
"""For clients to read that the router leaves."""
CLIENT_CLOSED_REQUEST = 499
MAX_HOP_ID_LENGTH = 160
"""Of a client's request id on its way to the engines, where it gets suffixes."""
_OPEN_PATHS = frozenset({"/health", "/metrics"})
_TRACESTATE_HEADER = "tracestate"

KeyCheck = Callable[[web.Request], None]
"""Raises RequestError for a request without the key."""


class RouterApp:
    """Handlers of all endpoints; ``app`` is what aiohttp serves, with ``handler_cancellation``
    on.
    """

    def __init__(self, spec: RouterSpec, hops: Hops, supervisor: SupervisorLink) -> None:
        self._spec = spec
        self._hops = hops
        self._started = int(time.time())
        self.admission = Admission(spec.max_queued_requests)
        self._deadline = Deadline(spec.request_timeout_s)
        self._repeats = Repeats()
        self._bodies = BodyBudget(spec.body_budget_bytes)
        self._inputs = LargeInputs()
        self._guard = Guard(
            spec.host, allowed_hosts=spec.allowed_hosts, cors_origins=spec.cors_origins
        )
        self.app = web.Application(client_max_size=spec.max_body_bytes)
        self.app.on_response_prepare.append(self._guard.add_cors_headers)
        self._route("POST", COMPLETIONS.path, self._completions)
        self._route("POST", CHAT.path, self._chat_completions)
        self._route("GET", "/v1/models", self._models)
        self._route("GET", "/v1/models/{name}", self._model)
        self._route("POST", "/tokenize", self._proxied)
        self._route("POST", "/detokenize", self._proxied)
        self._route("GET", "/health", self._health)
        self._route("GET", "/metrics", self._metrics)
        self._route("GET", "/pdlaunch/status", self._status)
        for method, path, handler in Admin(hops, supervisor).routes():
            self._route(method, path, handler, check_key=self._check_admin_key)
        self._route("*", "/{path:.*}", self._unknown)

    async def close(self) -> None:
        """End every running request with an error, and wait ``CLOSE_TIMEOUT_S`` at most for the
        last to be told.
        """
        self._deadline.close()
        if not await self.admission.drain(CLOSE_TIMEOUT_S):
            logger.warning(
                "%d requests could not be told that the router leaves", self.admission.in_flight
            )

    def _route(
        self, method: str, path: str, handler: Handler, *, check_key: KeyCheck | None = None
    ) -> None:
        """Add a route behind the door, by default that of the clients. What answers GET answers
        HEAD too.
        """
        at_the_door = partial(self._at_the_door, handler, check_key or self._check_key)
        if method == "GET":
            self.app.router.add_get(path, at_the_door)
        else:
            self.app.router.add_route(method, path, at_the_door)

    async def _at_the_door(
        self, handler: Handler, check_key: KeyCheck, request: web.Request
    ) -> web.StreamResponse:
        """Give every request its id, ask for the key, and turn every error into one of the OpenAI
        form.

        Whoever can open the admin socket needs no key, and is no web page.
        """
        request_id = _request_id(request)
        with request_logging(request_id):
            try:
                # The id of a refused request is a new one, as the client's cannot be sent back.
                read_request_id(request.headers.get(REQUEST_ID_HEADER))
                answer = None
                if not came_through_admin_socket(request):
                    answer = self._guard.admit(request)
                    if answer is None:
                        check_key(request)
                response = answer or await handler(request, request_id)
            except asyncio.CancelledError:
                self._hops.metrics.requests.failed(CLIENT_CLOSED_REQUEST)
                raise
            except ConnectionError:
                self._hops.metrics.requests.failed(CLIENT_CLOSED_REQUEST)
                return web.Response(status=CLIENT_CLOSED_REQUEST)
            except Exception as error:
                response = error_response(error)
                self._hops.metrics.requests.failed(response.status)
        if not response.prepared:
            response.headers[REQUEST_ID_HEADER] = request_id
        return response

    def _check_key(self, request: web.Request) -> None:
        key = self._spec.api_key
        if key is None or request.path in _OPEN_PATHS:
            return
        if not has_bearer(request, [key]):
            raise RequestError(
                "the API key is missing or wrong", status=401, code="invalid_api_key"
            )

    def _check_admin_key(self, request: web.Request) -> None:
        key = self._spec.admin_api_key
        if key is None:
            message = (
                "commands are taken at the launch's admin socket alone (pdlaunch sleep finds it); "
                "set admin_api_key to open this"
            )
            raise RequestError(message, status=403, code="admin_api_key_unset")
        if not has_bearer(request, [key]):
            raise RequestError(
                "the admin API key is missing or wrong", status=401, code="invalid_admin_api_key"
            )

    async def _unknown(self, request: web.Request, request_id: HttpRequestId) -> web.StreamResponse:
        allowed: set[str] = set()
        for resource in self.app.router.resources():
            allowed |= (await resource.resolve(request))[1] - {METH_ANY}
        if not allowed:
            raise RequestError(f"there is no {request.path[:200]}", status=404, code="not_found")
        methods = ", ".join(sorted(allowed))
        message = f"{request.path[:200]} takes {methods}, not {request.method}"
        response = error_response(RequestError(message, status=405, code="method_not_allowed"))
        response.headers["Allow"] = methods
        self._hops.metrics.requests.failed(response.status)
        return response

    async def _completions(
        self, request: web.Request, request_id: HttpRequestId
    ) -> web.StreamResponse:
        return await self._generate(COMPLETIONS, request, request_id)

    async def _chat_completions(
        self, request: web.Request, request_id: HttpRequestId
    ) -> web.StreamResponse:
        return await self._generate(CHAT, request, request_id)

    async def _generate(
        self, endpoint: Endpoint, request: web.Request, request_id: HttpRequestId
    ) -> web.StreamResponse:
        if not self._hops.pool.serving:
            raise OverloadedError(
                "the deployment is starting",
                status=503,
                retry_after_s=RETRY_AFTER_S,
                code="starting",
            )
        with self._bodies.hold() as hold:
            body = await read_body(request, hold, max_bytes=self._spec.max_body_bytes)
            return await self._answered(endpoint, request, body, hold, request_id)

    async def _answered(
        self,
        endpoint: Endpoint,
        request: web.Request,
        body: bytes,
        hold: Hold,
        request_id: HttpRequestId,
    ) -> web.StreamResponse:
        """Answer a request whose body is here; what was answered before under its key is told
        again.
        """
        headers: dict[str, str] = {REQUEST_ID_HEADER: request_id}
        answer = partial(self._answer, endpoint, request, body, request_id)
        key = read_idempotency_key(request.headers)
        if key is not None:
            # The run may outlive this client, and its body with it.
            return await self._repeats.answer(
                key, request, body, headers, partial(_keep_and, hold, len(body), answer)
            )
        stream = ClientStream(request, headers)
        return await answer(stream) or stream.response

    async def _answer(
        self,
        endpoint: Endpoint,
        request: web.Request,
        body: bytes,
        request_id: HttpRequestId,
        stream: EventStream,
    ) -> web.Response | None:
        """The whole answer, or None when ``stream`` was told all of it."""
        client_request = await self._inputs.run(
            len(body) >= LARGE_BODY_BYTES,
            partial(
                read_client_request,
                endpoint,
                body,
                served_model_name=self._spec.served_model_name,
                request_id=request_id,
                hop_id=_hop_id(request_id, is_own=REQUEST_ID_HEADER not in request.headers),
                headers=_headers_to_pass(request),
            ),
        )
        with (
            self.admission.admit(len(client_request.prompts)),
            self._hops.metrics.requests.in_flight.track_inprogress(),
        ):
            if client_request.stream:
                await self._stream(client_request, stream)
                return None
            return await self._whole(client_request)

    async def _stream(self, client_request: ClientRequest, stream: EventStream) -> None:
        answer = StreamedAnswer(
            client_request,
            stream,
            model=self._spec.served_model_name,
            metrics=self._hops.metrics.requests,
            clock=time.perf_counter,
        )
        try:
            async with self._deadline.guard():
                await answer.finish(await self._run(client_request, answer))
        except ConnectionError:
            raise
        except Exception as error:
            if not stream.has_begun:
                raise
            response = error_response(error)
            self._hops.metrics.requests.failed(response.status)
            await stream.fail(error_event(error))

    async def _whole(self, client_request: ClientRequest) -> web.Response:
        answer = WholeAnswer(
            client_request,
            model=self._spec.served_model_name,
            metrics=self._hops.metrics.requests,
            clock=time.perf_counter,
        )
        async with self._deadline.guard():
            transcripts = await self._run(client_request, answer)
        return _json(answer.finish(transcripts))

    async def _run(self, client_request: ClientRequest, sink: Sink) -> list[Transcript]:
        """All prompts at once; the first error ends the others. Raises what a Generation raises."""
        generations = [Generation(prompt, self._hops, sink) for prompt in client_request.prompts]
        try:
            async with asyncio.TaskGroup() as group:
                for generation in generations:
                    group.create_task(generation.run())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [generation.transcript for generation in generations]

    async def _proxied(self, request: web.Request, request_id: HttpRequestId) -> web.Response:
        """Any engine can answer; the first that does."""
        with self._bodies.hold() as hold:
            body = await read_body(request, hold, max_bytes=self._spec.max_body_bytes)
            with self.admission.admit(1):
                return await self._ask_any(request, body, request_id)

    async def _ask_any(
        self, request: web.Request, body: bytes, request_id: HttpRequestId
    ) -> web.Response:
        pool = self._hops.pool
        tried: set[EngineKey] = set()
        while (engine := pool.pick("decode", exclude=tried)) is not None:
            try:
                headers = _headers_to_pass(request) | {
                    REQUEST_ID_HEADER: _hop_id(request_id, is_own=False)
                }
                async with self._deadline.guard():
                    answer = await self._hops.client.ask(engine, request.path, body, headers)
                return web.Response(body=answer, content_type="application/json")
            except EngineFailure:
                pool.failed(engine)
                tried.add(engine.key)
        raise OverloadedError(
            "no engine is ready", status=503, retry_after_s=RETRY_AFTER_S, code="no_engine_ready"
        )

    async def _models(self, request: web.Request, request_id: HttpRequestId) -> web.Response:
        return _json(ModelList(data=[self._model_card()]))

    async def _model(self, request: web.Request, request_id: HttpRequestId) -> web.Response:
        name = request.match_info["name"]
        if name != self._spec.served_model_name:
            raise model_not_found(name, self._spec.served_model_name)
        return _json(self._model_card())

    def _model_card(self) -> ModelCard:
        pool = self._hops.pool
        return ModelCard(
            id=self._spec.served_model_name,
            created=self._started,
            root=self._spec.served_model_name,
            max_model_len=pool.max_model_len("decode") or pool.max_model_len("prefill"),
        )

    async def _health(self, request: web.Request, request_id: HttpRequestId) -> web.Response:
        """200 once the launch is ready, while some engine can serve and the door is open."""
        pool = self._hops.pool
        engines = pool.engines
        status = (
            "starting"
            if not pool.serving
            else "ok"
            if any(engine.ready for engine in engines)
            else "unavailable"
        )
        if self.admission.is_draining:
            status = "draining"
        body = {"status": status, "engines": {engine.name: engine.state for engine in engines}}
        return _json(body, status=200 if status == "ok" else 503)

    async def _status(self, request: web.Request, request_id: HttpRequestId) -> web.Response:
        """The engines and where they answer, for `pdlaunch smoke` and people."""
        engines = [
            {
                "name": engine.name,
                "role": engine.role,
                "url": engine.url,
                "state": engine.state,
                "reason": engine.reason,
                "streams": engine.num_streams,
            }
            for engine in self._hops.pool.engines
        ]
        return _json({"engines": engines})

    async def _metrics(self, request: web.Request, request_id: HttpRequestId) -> web.Response:
        """The router's metrics and those of all engines."""
        self._hops.metrics.in_flight.set(self.admission.in_flight)
        self._hops.metrics.show_engines([engine.state for engine in self._hops.pool.engines])
        page = await scrape(self._hops.metrics.text(), self._hops.client, self._hops.pool.engines)
        return web.Response(body=page, headers={"Content-Type": METRICS_CONTENT_TYPE})


async def _keep_and(
    hold: Hold, num_bytes: int, answer: Work, stream: EventStream
) -> web.Response | None:
    """Answer with the room of the body kept; a client that left at once has given it back
    already.
    """
    with hold.shared():
        hold.grow_to(num_bytes)
        return await answer(stream)


def _request_id(request: web.Request) -> HttpRequestId:
    try:
        return HttpRequestId(read_request_id(request.headers.get(REQUEST_ID_HEADER)))
    except RequestError:
        return HttpRequestId(read_request_id(None))


def _hop_id(request_id: HttpRequestId, *, is_own: bool) -> HopId:
    """Unique at the engines, which the ids of clients need not be."""
    if is_own:
        return HopId(request_id)
    return HopId(f"{request_id[:MAX_HOP_ID_LENGTH]}-{secrets.token_hex(4)}")


def _headers_to_pass(request: web.Request) -> dict[str, str]:
    traceparent = read_traceparent(request.headers.get(TRACEPARENT_HEADER))
    if traceparent is None:
        return {}
    tracestate = request.headers.get(_TRACESTATE_HEADER)
    return {TRACEPARENT_HEADER: traceparent} | (
        {} if tracestate is None else {_TRACESTATE_HEADER: tracestate}
    )


def _json(payload: object, *, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(payload), content_type="application/json"
    )
