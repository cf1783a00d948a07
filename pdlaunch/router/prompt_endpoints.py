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
from pdlaunch.http.errors import LEAVING_RETRY_AFTER_S, RETRY_AFTER_S, error_status, json_response
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
from pdlaunch.http.limits import (
    LARGE_BODY_BYTES,
    Admission,
    BodyBudget,
    Deadline,
    Deadlines,
    LargeInputs,
)
from pdlaunch.http.sse import ClientStream
from pdlaunch.protocol.ids import HopId, HttpRequestId
from pdlaunch.protocol.process.bootstrap import RouterSpec
from pdlaunch.router.answers import ClientAnswer, StreamedAnswer, WholeAnswer
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
from pdlaunch.router.request_record import RequestRecord
from pdlaunch.router.state import RouterState
from pdlaunch.router.transcript import Transcript

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
        completions, chat = (partial(self._generate, one) for one in (COMPLETIONS, CHAT))
        return [
            AppRoute("POST", COMPLETIONS.path, completions),
            AppRoute("POST", CHAT.path, chat),
            AppRoute("POST", "/tokenize", self._pass_on),
            AppRoute("POST", "/detokenize", self._pass_on),
        ]

    def close(self) -> None:
        self._deadlines.close()

    async def _generate(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        if not self._state.pool.serving:
            raise OverloadedError(
                "the deployment is starting",
                status=503,
                retry_after_s=RETRY_AFTER_S,
                code="starting",
            )
        async with self._bodies.read(request) as body:
            client_request = await self._read(endpoint, request, body)
            deadline = self._deadlines.start(read_timeout_s(request.headers.get(TIMEOUT_HEADER)))
            record = record_of(request)
            record.understood(client_request.fields.model, len(client_request.prompts))
            if self._spec.log_content:
                record.keep_content(bytes(client_request.prompts[0].text or b""))
            with (
                self._admission.admit(len(client_request.prompts)),
                self._state.metrics.requests.in_flight.track_inprogress(),
            ):
                if client_request.stream:
                    stream = ClientStream(request, {REQUEST_ID_HEADER: request_id_of(request)})
                    await self._stream(client_request, stream, record, deadline)
                    return stream.response
                return await self._whole(client_request, record, deadline)

    async def _read(self, endpoint: Endpoint, request: web.Request, body: bytes) -> ClientRequest:
        request_id = request_id_of(request)
        return await self._inputs.run(
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

    async def _stream(
        self,
        client_request: ClientRequest,
        stream: ClientStream,
        record: RequestRecord,
        deadline: Deadline,
    ) -> None:
        answer = StreamedAnswer(
            client_request,
            client_request.fields.model or self._spec.served_model_name,
            self._state.metrics.requests,
            record,
            stream,
            self._ignored_fields,
        )
        try:
            async with deadline.guard():
                await answer.finish(
                    await self._run(client_request, answer, record, deadline.wanted_at)
                )
        except ConnectionError:
            raise
        except Exception as error:
            if not stream.has_begun:
                raise
            self._state.metrics.requests.failed(error_status(error))
            record.fail(error)
            await answer.fail(error)

    async def _whole(
        self, client_request: ClientRequest, record: RequestRecord, deadline: Deadline
    ) -> web.Response:
        model = client_request.fields.model or self._spec.served_model_name
        answer = WholeAnswer(client_request, model, self._state.metrics.requests, record)
        async with deadline.guard():
            transcripts = await self._run(client_request, answer, record, deadline.wanted_at)
        headers = self._ignored_fields.headers(answer.ignored_fields) | answer.headers()
        return json_response(answer.finish(transcripts), headers=headers)

    async def _run(
        self,
        client_request: ClientRequest,
        answer: ClientAnswer,
        record: RequestRecord,
        wanted_at: float | None,
    ) -> list[Transcript]:
        """Answer all prompts at once; the first error ends the others and is raised."""
        return await _together(
            [
                answer_prompt(prompt, self._state, answer, record, wanted_at)
                for prompt in client_request.prompts
            ]
        )

    async def _pass_on(self, request: web.Request) -> web.Response:
        async with self._bodies.read(request) as body:
            with self._admission.admit(1):
                return await self._ask_any(request, body)

    async def _ask_any(self, request: web.Request, body: bytes) -> web.Response:
        pool = self._state.pool
        tried: frozenset[EngineKey] = frozenset()
        while (engine := pool.pick_any(tried)) is not None:
            try:
                headers = _headers_to_pass(request) | {
                    REQUEST_ID_HEADER: _hop_id(request_id_of(request), is_own=False)
                }
                async with self._deadlines.start().guard():
                    answer, ignored = await self._state.client.ask(
                        engine, request.path, body, headers
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
