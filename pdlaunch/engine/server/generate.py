"""Answers /v1/completions and /v1/chat/completions: read, prepare, generate, answer or stream.

::

    body -> request model -> prompts -> choices -> rank 0 -> deltas -> chunks, or one answer

A client that goes away cancels the handler, and leaving the handler aborts whatever runs.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TypeVar

from aiohttp import web

from pdlaunch.engine.server.answers import AnswerWriter
from pdlaunch.engine.server.engine_service import EngineService
from pdlaunch.engine.server.generation import Call, Generation
from pdlaunch.errors import PdlaunchError, RequestError
from pdlaunch.http.app import request_id_of
from pdlaunch.http.headers import (
    ORIGIN_HEADER,
    REQUEST_ID_HEADER,
    SPANS_HEADER,
    TRACEPARENT_HEADER,
    read_origin,
    read_traceparent,
)
from pdlaunch.http.limits import LARGE_BODY_BYTES, LARGE_TEXT_BYTES, Deadline, Ticket
from pdlaunch.http.sse import ClientStream
from pdlaunch.observe.metrics import RequestClock
from pdlaunch.observe.spans import SpanLog
from pdlaunch.protocol.ids import HopId
from pdlaunch.protocol.openai.requests import ChatCompletionRequest, CompletionRequest

_log = logging.getLogger(__name__)

R = TypeVar("R", CompletionRequest, ChatCompletionRequest)


async def generate(service: EngineService, kind: type[R], http: web.Request) -> web.StreamResponse:
    """Answer one request of ``kind``. Raises RequestError before the answer begins."""
    origin, is_suspect = read_origin(http.headers.get(ORIGIN_HEADER))
    call = Call(
        hop_id=HopId(request_id_of(http)),
        traceparent=read_traceparent(http.headers.get(TRACEPARENT_HEADER)),
        origin=origin,
        is_suspect=is_suspect,
        wants_spans=http.headers.get(SPANS_HEADER) == "1",
    )
    with service.admit() as ticket:
        deadline = service.deadlines.start()
        async with deadline.guard():
            request, prompts = await _read(service, kind, http, ticket, call.spans)
        generation = Generation(
            service.live_link(),
            call,
            request,
            prompts,
            service.model,
            has_peers=service.spec.has_peers,
        )
        return await _run(service, http, call, generation, deadline)


async def _read(
    service: EngineService, kind: type[R], http: web.Request, ticket: Ticket, spans: SpanLog
) -> tuple[R, list[list[int]]]:
    """Return the request and the token ids of its prompts; the ticket has all its places then.

    Raises RequestError.
    """
    async with service.read(http) as raw:
        model = service.model
        request = await service.inputs.run(
            len(raw) >= LARGE_BODY_BYTES, partial(model.read, kind, raw)
        )
        num_prompts = len(request.prompts) if isinstance(request, CompletionRequest) else 1
        ticket.grow(num_prompts * request.n, "n" if num_prompts == 1 else "prompt")
        spans.add("receive", spans.start_at, bytes=len(raw))
        with spans.measure("tokenize") as attributes:
            prompts = await service.inputs.run(
                len(raw) >= LARGE_TEXT_BYTES, partial(model.prompts, request)
            )
            attributes["tokens"] = sum(map(len, prompts))
        return request, prompts


async def _run(
    service: EngineService,
    http: web.Request,
    call: Call,
    generation: Generation,
    deadline: Deadline,
) -> web.StreamResponse:
    """Answer; then abort whatever is not finished, or a lease whose answer was not written."""
    metrics, request, choices = service.metrics, generation.request, generation.choices
    clock = RequestClock(metrics.requests)
    if call.traceparent is not None:
        _log.debug("traceparent %s", call.traceparent)
    metrics.asked(request.n, generation.num_prompt_tokens, choices)
    headers = {REQUEST_ID_HEADER: call.hop_id} | service.ignored_fields.headers(
        request.ignored_fields
    )
    writer = AnswerWriter(
        generation, service.model, call.hop_id, clock, call.spans if call.wants_spans else None
    )
    answered = False
    otherwise = "abort"  # the reason of choices without one: their client has gone away
    try:
        generation.start()
        if request.stream:
            response, answered = await _stream(http, headers, writer, deadline)
            otherwise = "abort" if answered else "error"
        else:
            response = await _answer(http, headers, writer, deadline)
            answered = True
    except PdlaunchError:
        otherwise = "error"
        raise
    finally:
        metrics.ended(choices, otherwise)
        generation.abort()
        if not answered:
            if call.wants_spans:
                service.unsent_spans.keep(call.hop_id, call.spans, generation.ended)
            if generation.is_remote_prefill:
                generation.release()
    if generation.is_remote_prefill:
        service.leases.add(call.hop_id, choices[0].request.request_id)
    num_output = sum(choice.num_tokens for choice in choices)
    clock.end(num_output)
    _log.info(
        "prompt_tokens=%d completion_tokens=%d finish_reason=%s",
        generation.num_prompt_tokens,
        num_output,
        ",".join(str(choice.finish_reason) for choice in choices),
    )
    return response


async def _answer(
    http: web.Request, headers: dict[str, str], writer: AnswerWriter, deadline: Deadline
) -> web.StreamResponse:
    """Write one JSON body. Raises RequestError, or ConnectionError when the client has left."""
    async with deadline.guard():
        body = await writer.whole()
        response = web.Response(body=body, content_type="application/json", headers=headers)
        # Written here, so that its caller knows when nobody took the answer.
        await response.prepare(http)
        await response.write_eof()
    return response


async def _stream(
    http: web.Request, headers: dict[str, str], writer: AnswerWriter, deadline: Deadline
) -> tuple[web.StreamResponse, bool]:
    """Write server-sent events; return False for a stream that ended with an error.

    Raises RequestError before the first event; later errors are events.
    """
    stream = ClientStream(http, headers)
    try:
        async with deadline.guard():
            async for events in writer.events():
                await stream.write(events)
            await stream.end(writer.last_events())
    except ConnectionError:
        raise
    except Exception as error:
        if not stream.has_begun:
            raise
        if isinstance(error, RequestError):
            _log.warning("stream failed: %s", error)
        await stream.fail(error)
        return stream.response, False
    return stream.response, True
