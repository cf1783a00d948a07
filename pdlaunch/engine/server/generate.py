"""Answers /v1/completions and /v1/chat/completions: read, prepare, generate, answer or stream.

::

    body -> request model -> prompts -> choices -> rank 0 -> deltas -> chunks, or one answer

A client that goes away cancels the handler, and leaving the handler aborts whatever runs.
"""

from __future__ import annotations

import logging
import secrets
from functools import partial

from aiohttp import web

from pdlaunch.engine.server.engine_reports import EngineReports
from pdlaunch.engine.server.engine_service import EngineService
from pdlaunch.engine.server.prepare import Call, Prepared, prepare
from pdlaunch.engine.server.prompts import (
    chat_prompt,
    completion_prompts,
    read_chat,
    read_completion,
)
from pdlaunch.engine.server.render import ChatRenderer, CompletionRenderer, Renderer
from pdlaunch.engine.server.respond import Answerer
from pdlaunch.engine.server.running_choices import RunningChoices
from pdlaunch.errors import PdlaunchError
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
from pdlaunch.observe.metrics import RequestClock
from pdlaunch.observe.spans import SpanLog
from pdlaunch.protocol.ids import NO_ORIGIN, HopId
from pdlaunch.protocol.openai.requests import ChatCompletionRequest, CompletionRequest

_log = logging.getLogger(__name__)


class GenerateHandler:
    """Answers both completion endpoints of one engine."""

    def __init__(self, service: EngineService) -> None:
        self._service = service

    async def completions(self, http: web.Request) -> web.StreamResponse:
        call = _read_call(http)
        with self._service.admit() as ticket:
            deadline = self._service.deadlines.start()
            async with deadline.guard():
                request, prompts = await self._read_completion(http, ticket, call.spans)
            model, has_peers = self._service.model, self._service.spec.has_peers
            prepared = prepare(
                call, request, prompts, model, prompt_param="prompt", has_peers=has_peers
            )
            renderer = CompletionRenderer(
                request,
                call.hop_id,
                model.name,
                model.tokenizer,
                prompts,
                self._reports_for(call),
            )
            return await self._run(http, call, prepared, renderer, deadline)

    async def chat(self, http: web.Request) -> web.StreamResponse:
        call = _read_call(http)
        with self._service.admit() as ticket:
            deadline = self._service.deadlines.start()
            async with deadline.guard():
                request, prompt = await self._read_chat(http, ticket, call.spans)
            model, has_peers = self._service.model, self._service.spec.has_peers
            prepared = prepare(
                call, request, [prompt], model, prompt_param="messages", has_peers=has_peers
            )
            renderer = ChatRenderer(
                request,
                call.hop_id,
                model.name,
                model.tokenizer,
                [prompt],
                self._reports_for(call),
            )
            return await self._run(http, call, prepared, renderer, deadline)

    def _reports_for(self, call: Call) -> EngineReports | None:
        """Return what a router of ours is told, which names the origin of each prompt."""
        return self._service.reports if call.origin != NO_ORIGIN else None

    async def _read_completion(
        self, http: web.Request, ticket: Ticket, spans: SpanLog
    ) -> tuple[CompletionRequest, list[list[int]]]:
        """Return the request, and the token ids of its prompts.

        The ticket has all the request's places then. Raises RequestError.
        """
        async with self._service.read(http) as raw:
            inputs, model = self._service.inputs, self._service.model
            request = await inputs.run(
                len(raw) >= LARGE_BODY_BYTES,
                partial(read_completion, raw, model, self._service.spec.strict_fields),
            )
            num_prompts = len(request.prompts)
            ticket.grow(num_prompts * request.n, "n" if num_prompts == 1 else "prompt")
            spans.add("receive", spans.start_at, bytes=len(raw))
            with spans.measure("tokenize") as attributes:
                prompts = await inputs.run(
                    len(raw) >= LARGE_TEXT_BYTES, partial(completion_prompts, request, model)
                )
                attributes["tokens"] = sum(map(len, prompts))
            return request, prompts

    async def _read_chat(
        self, http: web.Request, ticket: Ticket, spans: SpanLog
    ) -> tuple[ChatCompletionRequest, list[int]]:
        """Return the request, and the token ids of its one prompt.

        The ticket has all the request's places then. Raises RequestError.
        """
        async with self._service.read(http) as raw:
            inputs, model = self._service.inputs, self._service.model
            request = await inputs.run(
                len(raw) >= LARGE_BODY_BYTES,
                partial(read_chat, raw, model, self._service.spec.strict_fields),
            )
            ticket.grow(request.n, "n")
            spans.add("receive", spans.start_at, bytes=len(raw))
            with spans.measure("tokenize") as attributes:
                prompt = await inputs.run(
                    len(raw) >= LARGE_TEXT_BYTES, partial(chat_prompt, request, model)
                )
                attributes["tokens"] = len(prompt)
            return request, prompt

    async def _run(
        self,
        http: web.Request,
        call: Call,
        prepared: Prepared,
        renderer: Renderer,
        deadline: Deadline,
    ) -> web.StreamResponse:
        """Answer the request.

        On the way out, whatever is not finished is aborted, and so is a lease whose answer could
        not be written.
        """
        metrics = self._service.metrics
        clock = RequestClock(metrics.requests)
        if call.traceparent is not None:
            _log.debug("traceparent %s", call.traceparent)
        metrics.requests.prompt_tokens.inc(prepared.num_prompt_tokens)
        metrics.requests.prompt_length.observe(prepared.num_prompt_tokens)
        metrics.asked(renderer.request.n, prepared.choices)
        running = RunningChoices(
            self._service.live_link(),
            prepared.choices,
            num_prompt_tokens=prepared.num_prompt_tokens,
            spans=call.spans,
        )
        headers = {REQUEST_ID_HEADER: call.hop_id} | self._service.ignored_fields.headers(
            renderer.request.ignored_fields
        )
        answerer = Answerer(
            http,
            headers,
            prepared,
            renderer,
            running,
            clock,
            deadline,
            call.spans if call.wants_spans else None,
        )
        # Until the last byte is written nobody knows of the lease, and nobody else would end it.
        answered = False
        # What becomes of choices without a reason of their own: their client has gone away, unless
        # something else is known.
        otherwise = "abort"
        try:
            self._service.running[call.hop_id] = running
            running.start()
            response = await (answerer.stream() if renderer.request.stream else answerer.answer())
            answered = not answerer.broke_off
            if answerer.broke_off:
                otherwise = "error"
        except PdlaunchError:
            otherwise = "error"
            raise
        finally:
            metrics.ended(prepared.choices, otherwise)
            running.abort()
            if call.wants_spans and not answered:
                self._service.unsent_spans.keep(call.hop_id, call.spans, running.ended)
            if self._service.running.get(call.hop_id) is running:
                del self._service.running[call.hop_id]
            if prepared.is_remote_prefill and not answered:
                running.release()
        if prepared.is_remote_prefill and answered:
            self._service.leases.add(call.hop_id, prepared.choices[0].request.request_id)
        clock.end(sum(choice.num_tokens for choice in prepared.choices))
        _log.info("%s", _summary(prepared))
        return response


def _read_call(http: web.Request) -> Call:
    hop_id = HopId(request_id_of(http))
    origin, is_suspect = read_origin(http.headers.get(ORIGIN_HEADER))
    return Call(
        hop_id=hop_id,
        unique_id=f"{hop_id}-{secrets.token_hex(4)}",
        traceparent=read_traceparent(http.headers.get(TRACEPARENT_HEADER)),
        origin=origin,
        is_suspect=is_suspect,
        wants_spans=http.headers.get(SPANS_HEADER) == "1",
    )


def _summary(prepared: Prepared) -> str:
    num_output = sum(choice.num_tokens for choice in prepared.choices)
    reasons = ",".join(str(choice.finish_reason) for choice in prepared.choices)
    return (
        f"prompt_tokens={prepared.num_prompt_tokens} completion_tokens={num_output} "
        f"finish_reason={reasons}"
    )
