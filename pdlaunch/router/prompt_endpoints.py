"""Answers requests with prompts: reads and admits them, and runs each one's prompts at once."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from aiohttp import web

from pdlaunch.errors import OverloadedError
from pdlaunch.http.app import AppRoute, request_id_of
from pdlaunch.http.errors import LEAVING_RETRY_AFTER_S, RETRY_AFTER_S, error_status
from pdlaunch.http.headers import (
    REQUEST_ID_HEADER,
    ROUTE_HEADER,
    SPANS_HEADER,
    TIMEOUT_HEADER,
    TRACEPARENT_HEADER,
    TRACESTATE_HEADER,
    WANTS_PAIR,
    IgnoredFields,
    read_timeout_s,
    read_traceparent,
)
from pdlaunch.http.limits import LARGE_BODY_BYTES, Admission, BodyBudget, Deadlines, LargeInputs
from pdlaunch.http.sse import ClientStream
from pdlaunch.protocol.ids import HopId, HttpRequestId
from pdlaunch.protocol.process.bootstrap import RouterSpec
from pdlaunch.router.answers import ClientAnswer
from pdlaunch.router.client_request import (
    CHAT,
    COMPLETIONS,
    ClientRequest,
    Endpoint,
    read_client_request,
)
from pdlaunch.router.engine import EngineKey
from pdlaunch.router.engine_client import EngineFailure
from pdlaunch.router.policy import no_engine_ready
from pdlaunch.router.relay import answer_prompt
from pdlaunch.router.request_history import record_of
from pdlaunch.router.state import RouterState

T = TypeVar("T")

MAX_HOP_ID_LENGTH = 160
"""Characters of a client's request id the engines get to see; suffixes come behind it."""


class PromptEndpoints:
    """Answers completions, chats, and questions about tokens."""

    def __init__(self, spec: RouterSpec, state: RouterState, admission: Admission) -> None:
        self._spec = spec
        self._state = state
        self._admission = admission
        self._deadlines = Deadlines(
            spec.request_timeout_s, shutting_down, retry_after_s=RETRY_AFTER_S
        )
        self._bodies = BodyBudget(spec.body_budget_bytes, spec.max_body_bytes)
        self._inputs = LargeInputs()
        self._ignored_fields = IgnoredFields()

    def routes(self) -> list[AppRoute]:
        return [
            *(AppRoute("POST", e.path, partial(self._generate, e)) for e in (COMPLETIONS, CHAT)),
            AppRoute("POST", "/tokenize", self._pass_on),
            AppRoute("POST", "/detokenize", self._pass_on),
        ]

    def close(self) -> None:
        self._deadlines.close()

    async def _generate(self, endpoint: Endpoint, http: web.Request) -> web.StreamResponse:
        if not self._state.pool.serving:
            raise OverloadedError(
                "the deployment is starting",
                status=503,
                retry_after_s=RETRY_AFTER_S,
                code="starting",
            )
        # The body is held until the answer is whole: another engine may be asked meanwhile.
        async with self._bodies.read(http) as body:
            request = await self._read(endpoint, http, body)
            record, num_prompts = record_of(http), len(request.prompts)
            record.understood(request.fields.model, num_prompts)
            with (
                self._admission.admit(num_prompts),
                self._state.metrics.requests.in_flight.track_inprogress(),
            ):
                return await self._answer(http, request)

    async def _read(self, endpoint: Endpoint, http: web.Request, body: bytes) -> ClientRequest:
        request_id = request_id_of(http)
        read = partial(
            read_client_request,
            endpoint,
            body,
            served_model_name=self._spec.served_model_name,
            request_id=request_id,
            hop_id=_hop_id(request_id, is_own=REQUEST_ID_HEADER not in http.headers),
            headers=_headers_to_pass(http),
            wants_pair=http.headers.get(ROUTE_HEADER) == WANTS_PAIR,
            has_own_fields=self._state.pool.has_own_fields,
        )
        return await self._inputs.run(len(body) >= LARGE_BODY_BYTES, read)

    async def _answer(self, http: web.Request, request: ClientRequest) -> web.StreamResponse:
        """Answer all prompts at once; the first error ends the others and is the answer."""
        state, record, stream = self._state, record_of(http), None
        deadline = self._deadlines.start(read_timeout_s(http.headers.get(TIMEOUT_HEADER)))
        if request.fields.stream:
            stream = ClientStream(http, {REQUEST_ID_HEADER: request_id_of(http)})
        metrics = state.metrics.requests
        answer = ClientAnswer(request, metrics, record, self._ignored_fields, stream)
        try:
            async with deadline.guard():
                answers = [
                    answer_prompt(prompt, state, answer, record, deadline.wanted_at)
                    for prompt in request.prompts
                ]
                return await answer.finish(await _together(answers))
        except Exception as error:
            if isinstance(error, ConnectionError) or stream is None or not stream.has_begun:
                raise
            # The client has its status: the error can only be an event.
            metrics.failed(error_status(error))
            record.fail(error)
            await answer.flush()
            await stream.fail(error)
            return stream.response

    async def _pass_on(self, http: web.Request) -> web.Response:
        """Answer a question about tokens by any engine."""
        pool, tried = self._state.pool, frozenset[EngineKey]()
        hop_id = _hop_id(request_id_of(http), is_own=False)
        headers = _headers_to_pass(http) | {REQUEST_ID_HEADER: hop_id}
        async with self._bodies.read(http) as body:
            with self._admission.admit(1):
                while (engine := pool.pick_any(tried)) is not None:
                    try:
                        async with self._deadlines.start().guard():
                            answer, ignored = await self._state.client.ask(
                                engine, http.path, body, headers
                            )
                        return web.Response(
                            body=answer,
                            content_type="application/json",
                            headers=self._ignored_fields.headers(ignored),
                        )
                    except EngineFailure:
                        pool.failed(engine)
                        tried |= {engine.key}
        raise no_engine_ready("no engine is ready")


def _hop_id(request_id: HttpRequestId, *, is_own: bool) -> HopId:
    """Return an id that is unique at the engines, which the ids of clients need not be."""
    if is_own:
        return HopId(request_id)
    return HopId(f"{request_id[:MAX_HOP_ID_LENGTH]}-{secrets.token_hex(4)}")


def _headers_to_pass(http: web.Request) -> dict[str, str]:
    """Return what engines get of the client's headers, and the question for their spans."""
    headers = {SPANS_HEADER: "1"}
    own = record_of(http).trace_headers
    if own:
        return headers | own
    traceparent = read_traceparent(http.headers.get(TRACEPARENT_HEADER))
    if traceparent is not None:
        headers[TRACEPARENT_HEADER] = traceparent
        if (tracestate := http.headers.get(TRACESTATE_HEADER)) is not None:
            headers[TRACESTATE_HEADER] = tracestate
    return headers


async def _together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all works at once; the first error ends the others and is raised."""
    if len(works) == 1:
        return [await works[0]]
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


def shutting_down() -> OverloadedError:
    """Return the error of requests that come while the router leaves."""
    return OverloadedError(
        "the deployment is shutting down",
        status=503,
        retry_after_s=LEAVING_RETRY_AFTER_S,
        code="draining",
    )
