"""Answers the public HTTP API of a deployment."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from aiohttp import web

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.admission import Admission
from pdlaunch.http.app import (
    CHAT_OPERATION,
    COMPLETIONS_OPERATION,
    DETOKENIZE_OPERATION,
    METRICS_OPERATION,
    TOKENIZE_OPERATION,
    AppRoute,
    Description,
    HttpApp,
    KeyCheck,
    bearer_check,
    health_routes,
    model_routes,
    request_id_of,
)
from pdlaunch.http.bodies import BodyBudget, Hold, read_body
from pdlaunch.http.deadline import Deadlines
from pdlaunch.http.errors import (
    LEAVING_RETRY_AFTER_S,
    RETRY_AFTER_S,
    error_status,
    json_response,
)
from pdlaunch.http.guard import Guard
from pdlaunch.http.headers import (
    REQUEST_ID_HEADER,
    SPANS_HEADER,
    TRACEPARENT_HEADER,
    TRACESTATE_HEADER,
    read_traceparent,
)
from pdlaunch.http.ignored_fields import IgnoredFields
from pdlaunch.http.large_inputs import LARGE_BODY_BYTES, LargeInputs
from pdlaunch.http.sse import ClientStream, EventStream
from pdlaunch.observe.metrics import METRICS_CONTENT_TYPE
from pdlaunch.process.bootstrap import RouterSpec
from pdlaunch.protocol.costs import ROUTE_HEADER, WANTS_PAIR
from pdlaunch.protocol.ids import HopId, HttpRequestId
from pdlaunch.protocol.openai.responses import ModelCard
from pdlaunch.router.admin import Admin, SupervisorLink
from pdlaunch.router.admin_engines import EngineCommands
from pdlaunch.router.admin_socket import came_through_admin_socket
from pdlaunch.router.answers import StreamedAnswer, WholeAnswer
from pdlaunch.router.client_request import (
    CHAT,
    COMPLETIONS,
    ClientRequest,
    Endpoint,
    read_client_request,
)
from pdlaunch.router.deployment_view import DeploymentView
from pdlaunch.router.engine import EngineKey
from pdlaunch.router.engine_errors import EngineFailure
from pdlaunch.router.generation import generate
from pdlaunch.router.idempotency import Repeats, Work, read_idempotency_key
from pdlaunch.router.membership_watch import WatchedMembership
from pdlaunch.router.metrics import scrape
from pdlaunch.router.otlp import OtlpExporter
from pdlaunch.router.page import PAGE_PATHS, page_routes
from pdlaunch.router.policy import RoutingRequest
from pdlaunch.router.prompt_progress import ChunkSink
from pdlaunch.router.recovery import no_engine_ready
from pdlaunch.router.request_book import RequestBook, record_of
from pdlaunch.router.request_lines import RequestLines
from pdlaunch.router.request_record import RequestRecord
from pdlaunch.router.state import RouterState
from pdlaunch.router.transcript import Transcript

logger = logging.getLogger(__name__)

T = TypeVar("T")

OPEN_PATHS = ("/health", "/ping", "/metrics", *PAGE_PATHS)
"""Need no key; the page holds no data."""
CLOSE_TIMEOUT_S = 1.0
"""Seconds that clients may take to read that the router leaves."""
MAX_HOP_ID_LENGTH = 160
"""Characters of a client's request id the engines get to see; suffixes come behind it."""


class RouterApp:
    """Answers every endpoint; ``app`` is what aiohttp serves, with ``handler_cancellation`` on.

    ``membership``: engines that run already, which commands add and remove; None in a launch.
    ``show_request`` takes the line of each request for a terminal.
    """

    def __init__(
        self,
        spec: RouterSpec,
        state: RouterState,
        supervisor: SupervisorLink,
        membership: WatchedMembership | None = None,
        show_request: Callable[[str], None] | None = None,
    ) -> None:
        self._spec = spec
        self._state = state
        self._started = int(time.time())
        self.admission = Admission(spec.max_queued_requests, _shutting_down)
        self.view = DeploymentView(state, self.admission, spec.served_model_name)
        self._deadlines = Deadlines(
            spec.request_timeout_s, _shutting_down, retry_after_s=RETRY_AFTER_S
        )
        self._repeats = Repeats()
        self._bodies = BodyBudget(spec.body_budget_bytes)
        self._inputs = LargeInputs()
        self._ignored_fields = IgnoredFields()
        exporter = (
            None
            if spec.otlp_endpoint is None
            else OtlpExporter(spec.otlp_endpoint, spec.otlp_sample)
        )
        self.book = RequestBook(spec.kept_requests, RequestLines(show_request).write, exporter)
        check_admin_key = _admin_key_check(spec.admin_api_key)
        self.app = HttpApp(
            [
                AppRoute(
                    "POST",
                    COMPLETIONS.path,
                    partial(self._generate, COMPLETIONS),
                    None,
                    COMPLETIONS_OPERATION,
                ),
                AppRoute("POST", CHAT.path, partial(self._generate, CHAT), None, CHAT_OPERATION),
                *model_routes(self._model_cards),
                AppRoute("POST", "/tokenize", self._proxied, None, TOKENIZE_OPERATION),
                AppRoute("POST", "/detokenize", self._proxied, None, DETOKENIZE_OPERATION),
                *health_routes(self._health),
                AppRoute("GET", "/metrics", self._metrics, None, METRICS_OPERATION),
                *self.view.routes(),
                *self.book.routes(),
                *(page_routes() if spec.page else []),
                *(
                    route._replace(check_key=check_admin_key)
                    for route in (
                        *EngineCommands(membership, spec.drain_timeout_s).routes(),
                        *Admin(state, supervisor).routes(),
                    )
                ),
            ],
            guard=Guard(
                spec.host, allowed_hosts=spec.allowed_hosts, cors_origins=spec.cors_origins
            ),
            check_key=_client_key_check(spec.api_key),
            metrics=state.metrics.requests,
            max_body_bytes=spec.max_body_bytes,
            description=Description(
                "pdlaunch",
                public=True,
                strict_fields=spec.strict_fields,
                has_key=spec.api_key is not None,
                open_paths=OPEN_PATHS,
            ),
            is_trusted=came_through_admin_socket,
            watch=self.book,
        ).app

    async def close(self) -> None:
        """End every running request with an error.

        Waits at most ``CLOSE_TIMEOUT_S`` for the last client to be told.
        """
        self._deadlines.close()
        await self.view.close()
        if not await self.admission.drain(CLOSE_TIMEOUT_S):
            logger.warning(
                "%d requests could not be told that the router leaves", self.admission.in_flight
            )
        await self.book.close()

    async def _generate(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        if not self._state.pool.serving:
            raise OverloadedError(
                "the deployment is starting",
                status=503,
                retry_after_s=RETRY_AFTER_S,
                code="starting",
            )
        with self._bodies.hold() as hold:
            body = await read_body(request, hold, max_bytes=self._spec.max_body_bytes)
            return await self._answered(endpoint, request, body, hold)

    async def _answered(
        self,
        endpoint: Endpoint,
        request: web.Request,
        body: bytes,
        hold: Hold,
    ) -> web.StreamResponse:
        """Answer a request whose body is here, or repeat the answer to its idempotency key."""
        headers: dict[str, str] = {REQUEST_ID_HEADER: request_id_of(request)}
        answer = partial(self._answer, endpoint, request, body)
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
        stream: EventStream,
    ) -> web.Response | None:
        """Return the whole answer, or None when ``stream`` was told all of it."""
        request_id, record = request_id_of(request), record_of(request)
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
                strict_fields=self._spec.strict_fields,
                wants_pair=request.headers.get(ROUTE_HEADER) == WANTS_PAIR,
                has_own_fields=self._state.pool.has_own_fields,
            ),
        )
        record.understood(client_request.fields.model, len(client_request.prompts))
        if self._spec.log_content:
            record.keep_content(bytes(client_request.prompts[0].text or b""))
        with (
            self.admission.admit(len(client_request.prompts)),
            self._state.metrics.requests.in_flight.track_inprogress(),
        ):
            if client_request.stream:
                await self._stream(client_request, stream, record)
                return None
            return await self._whole(client_request, stream, record)

    async def _stream(
        self, client_request: ClientRequest, stream: EventStream, record: RequestRecord
    ) -> None:
        answer = StreamedAnswer(
            client_request,
            stream,
            model=client_request.fields.model or self._spec.served_model_name,
            metrics=self._state.metrics.requests,
            record=record,
            ignored=self._ignored_fields,
        )
        try:
            async with self._deadlines.start().guard():
                await answer.finish(await self._run(client_request, answer, record))
        except ConnectionError:
            raise
        except Exception as error:
            if not stream.has_begun:
                raise
            self._state.metrics.requests.failed(error_status(error))
            record.fail(error)
            await stream.fail(error)

    async def _whole(
        self, client_request: ClientRequest, stream: EventStream, record: RequestRecord
    ) -> web.Response:
        answer = WholeAnswer(
            client_request,
            model=client_request.fields.model or self._spec.served_model_name,
            metrics=self._state.metrics.requests,
            record=record,
        )
        async with self._deadlines.start().guard():
            transcripts = await self._run(client_request, answer, record)
        headers = self._ignored_fields.headers(answer.ignored_fields) | answer.headers()
        stream.add_headers(headers)  # a recording repeats them
        return json_response(answer.finish(transcripts), headers=headers)

    async def _run(
        self, client_request: ClientRequest, sink: ChunkSink, record: RequestRecord
    ) -> list[Transcript]:
        """Answer all prompts at once; the first error ends the others and is raised."""
        return await _together(
            [generate(prompt, self._state, sink, record) for prompt in client_request.prompts]
        )

    async def _proxied(self, request: web.Request) -> web.Response:
        """Pass a request on to any engine that answers it."""
        with self._bodies.hold() as hold:
            body = await read_body(request, hold, max_bytes=self._spec.max_body_bytes)
            with self.admission.admit(1):
                return await self._ask_any(request, body)

    async def _ask_any(self, request: web.Request, body: bytes) -> web.Response:
        pool = self._state.pool
        tried: frozenset[EngineKey] = frozenset()
        while (engine := pool.route(RoutingRequest(hop="decode", tried=tried)).decode) is not None:
            try:
                headers = _headers_to_pass(request) | {
                    REQUEST_ID_HEADER: _hop_id(request_id_of(request), is_own=False)
                }
                async with self._deadlines.start().guard():
                    answer = await self._state.client.ask(engine, request.path, body, headers)
                return web.Response(
                    body=answer.body,
                    content_type="application/json",
                    headers=self._ignored_fields.headers(answer.ignored_fields),
                )
            except EngineFailure:
                pool.failed(engine)
                tried |= {engine.key}
        raise no_engine_ready("no engine is ready")

    def _model_cards(self) -> list[ModelCard]:
        """Describe the served model, and what else engines with names of their own have told."""
        pool, name = self._state.pool, self._spec.served_model_name
        own = ModelCard(
            id=name,
            created=self._started,
            root=name,
            max_model_len=pool.max_model_len("decode")
            or pool.max_model_len("both")
            or pool.max_model_len("prefill"),
        )
        others = {
            card.id: card
            for engine in pool.engines
            if engine.ready and engine.capabilities.has_own_fields
            for card in engine.models
        }
        return [own, *(card for card in others.values() if card.id != name)]

    async def _health(self, _: web.Request) -> web.Response:
        """Answer 200 once the launch is ready, while some engine can serve and the door is open."""
        status, engines = self.view.state(), self._state.pool.engines
        body = {"status": status, "engines": {engine.name: engine.state for engine in engines}}
        return json_response(body, status=200 if status == "ok" else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        """Answer with the router's metrics and those of all engines."""
        self._state.metrics.in_flight.set(self.admission.in_flight)
        self._state.metrics.show_engines(
            {engine.name: engine.state for engine in self._state.pool.engines}
        )
        page = await scrape(
            self._state.metrics.text(), self._state.client, self._state.pool.engines
        )
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


def _hop_id(request_id: HttpRequestId, *, is_own: bool) -> HopId:
    """Return an id that is unique at the engines, which the ids of clients need not be."""
    if is_own:
        return HopId(request_id)
    return HopId(f"{request_id[:MAX_HOP_ID_LENGTH]}-{secrets.token_hex(4)}")


def _headers_to_pass(request: web.Request) -> dict[str, str]:
    """Return what engines get of the client's headers, and the question for their spans."""
    headers = {SPANS_HEADER: "1"}
    own = record_of(request).trace_headers
    if own:
        return headers | own
    traceparent = read_traceparent(request.headers.get(TRACEPARENT_HEADER))
    if traceparent is not None:
        headers[TRACEPARENT_HEADER] = traceparent
        tracestate = request.headers.get(TRACESTATE_HEADER)
        if tracestate is not None:
            headers[TRACESTATE_HEADER] = tracestate
    return headers


async def _together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all works at once; the first error ends the others and is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A task holds its error, whose traceback holds this frame: the request's body would stay
        # in memory until the garbage collector comes.
        tasks.clear()
        del task


def _client_key_check(key: str | None) -> KeyCheck:
    if key is None:
        return lambda _: None
    return bearer_check(
        [key],
        message="the API key is missing or wrong",
        code="invalid_api_key",
        open_paths=OPEN_PATHS,
    )


def _admin_key_check(key: str | None) -> KeyCheck:
    if key is not None:
        return bearer_check(
            [key], message="the admin API key is missing or wrong", code="invalid_admin_api_key"
        )

    def refuse(_: web.Request) -> None:
        raise RequestError(
            "commands are taken at the launch's admin socket alone (pdlaunch sleep finds it); "
            "set admin_api_key to open this",
            status=403,
            code="admin_api_key_unset",
        )

    return refuse


def _shutting_down() -> OverloadedError:
    return OverloadedError(
        "the deployment is shutting down",
        status=503,
        retry_after_s=LEAVING_RETRY_AFTER_S,
        code="draining",
    )
