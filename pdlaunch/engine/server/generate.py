"""Answers /v1/completions and /v1/chat/completions: read, prepare, generate, answer or stream.

::

    body -> request model -> prompts -> choices -> rank 0 -> deltas -> chunks, or one answer

A client that goes away cancels the handler, and leaving the handler aborts whatever runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from pdlaunch.engine.server.choice import Delta
from pdlaunch.engine.server.engine_service import EngineService
from pdlaunch.engine.server.generation import Call, Generation
from pdlaunch.engine.server.served_model import ServedModel
from pdlaunch.engine.server.text import TextTokenizer
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
from pdlaunch.http.limits import LARGE_BODY_BYTES, LARGE_TEXT_BYTES, Deadline, Grow
from pdlaunch.http.sse import DONE, ClientStream, encode_event
from pdlaunch.observe.metrics import RequestClock
from pdlaunch.observe.spans import SpanLog
from pdlaunch.protocol.ids import HopId
from pdlaunch.protocol.kv_params import TokenOutput
from pdlaunch.protocol.openai.requests import ChatCompletionRequest, CompletionRequest
from pdlaunch.protocol.openai.responses import (
    REPORT_KEY,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatText,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    TokenLogprob,
    Usage,
)

_log = logging.getLogger(__name__)

R = TypeVar("R", CompletionRequest, ChatCompletionRequest)


async def generate(service: EngineService, kind: type[R], http: web.Request) -> web.StreamResponse:
    """Answer one request of ``kind``. Raises RequestError before the answer begins."""
    origin, is_suspect = read_origin(http.headers.get(ORIGIN_HEADER))
    call = Call(
        hop_id=HopId(request_id_of(http)),
        origin=origin,
        is_suspect=is_suspect,
        wants_spans=http.headers.get(SPANS_HEADER) == "1",
    )
    with service.admit() as grow:
        deadline = service.deadlines.start()
        async with deadline.guard():
            request, prompts = await _read(service, kind, http, grow, call.spans)
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
    service: EngineService, kind: type[R], http: web.Request, grow: Grow, spans: SpanLog
) -> tuple[R, list[list[int]]]:
    """Return the request and the token ids of its prompts; all its places are taken then.

    Raises RequestError.
    """
    async with service.read(http) as raw:
        model = service.model
        request = await service.inputs.run(
            len(raw) >= LARGE_BODY_BYTES, partial(model.read, kind, raw)
        )
        num_prompts = len(request.prompts) if isinstance(request, CompletionRequest) else 1
        grow(num_prompts * request.n, "n" if num_prompts == 1 else "prompt")
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
    if traceparent := read_traceparent(http.headers.get(TRACEPARENT_HEADER)):
        _log.debug("traceparent %s", traceparent)
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


_LOWEST = -9999.0  # JSON has no minus infinity; the value that OpenAI uses


class AnswerWriter:
    """Forms one request's answer, or its stream, while ``generation`` runs."""

    def __init__(
        self,
        generation: Generation,
        model: ServedModel,
        hop_id: HopId,
        clock: RequestClock,
        spans: SpanLog | None,
    ) -> None:
        """``spans``: what the caller is told, behind the answer; None: nothing."""
        self._generation = generation
        self._request = generation.request
        self._tokenizer = model.tokenizer
        self._clock = clock
        self._spans = spans
        self._is_chat = isinstance(generation.request, ChatCompletionRequest)
        self._wants_usage = generation.request.continuous_usage
        self._id = f"{'chatcmpl-' if self._is_chat else 'cmpl-'}{hop_id}"
        self._created = int(time.time())
        self._model = model.name

    async def whole(self) -> bytes:
        """Return the answer as one JSON body. Raises RequestError."""
        generation = self._generation
        whole = [Delta(choice.index) for choice in generation.choices]
        async for deltas in generation.deltas(self._clock):
            for delta in deltas:
                whole[delta.index].add(delta)
        for choice, delta in zip(generation.choices, whole, strict=True):
            delta.finish_reason, delta.stop_reason = choice.finish_reason, choice.stop_reason
        answer = self._new([self._choice(delta, is_whole=True) for delta in whole], is_whole=True)
        self._add_prompts(answer)
        answer.usage = generation.usage()
        if generation.is_remote_prefill:
            answer.kv_transfer_params = generation.hand_over(whole)
        body = msgspec.json.encode(answer)
        if self._spans is None:
            return body
        # Into the object that is written already: no other caller's answer has the member.
        report = msgspec.json.encode(self._spans.report())
        return b'%s,"%s":%s}' % (body[:-1], REPORT_KEY.encode(), report)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the stream but for its end, in pieces; each piece is what has come at once."""
        chunks = [] if self._generation.continues else self._opening()
        async for deltas in self._generation.deltas(self._clock):
            chunks += [self._chunk(delta) for delta in deltas if self._is_shown(delta)]
            if chunks:
                yield b"".join(map(encode_event, chunks))
            chunks = []

    def last_events(self) -> bytes:
        """Return the end of the stream."""
        end = b""
        if self._request.include_usage:
            last = self._new([])
            last.usage = self._generation.usage()
            end += encode_event(last)
        if self._spans is not None:
            end += encode_event({"choices": [], REPORT_KEY: self._spans.report()})
        return end + DONE

    def _is_shown(self, delta: Delta) -> bool:
        """Return whether a delta makes a chunk.

        Tokens whose text is held back do so only where the client asked for more than text.
        """
        if delta.text or delta.finish_reason is not None:
            return True
        request = self._request
        return bool(delta.tokens) and (
            request.return_token_ids or request.num_top_logprobs is not None
        )

    def _opening(self) -> list[ChatCompletion | Completion]:
        """Return the chunks before any text."""
        num_choices = self._request.n
        if self._is_chat:
            said = ChatText(role="assistant", content="")
            chunk = self._new([ChatChoice(index=i, delta=said) for i in range(num_choices)])
        elif self._request.return_token_ids:
            firsts = range(0, num_choices * len(self._generation.prompts), num_choices)
            chunk = self._new([self._choice(Delta(index)) for index in firsts])
        else:
            return []
        chunk.usage = self._usage_so_far()
        self._add_prompts(chunk)
        return [chunk]

    def _chunk(self, delta: Delta) -> ChatCompletion | Completion:
        chunk = self._new([self._choice(delta)])
        chunk.usage = self._usage_so_far()
        return chunk

    def _usage_so_far(self) -> Usage | UnsetType:
        return self._generation.usage() if self._wants_usage else UNSET

    def _new(self, choices: list[Any], *, is_whole: bool = False) -> ChatCompletion | Completion:
        """Return an answer, or a chunk of a stream."""
        answer: ChatCompletion | Completion
        if self._is_chat:
            answer = ChatCompletion(id=self._id, choices=choices)
            if not is_whole:
                answer.object = "chat.completion.chunk"
        else:
            answer = Completion(id=self._id, choices=choices)
        answer.created, answer.model = self._created, self._model
        return answer

    def _add_prompts(self, answer: ChatCompletion | Completion) -> None:
        """Add the prompts' token ids, where they are wanted."""
        prompts = self._generation.prompts
        if not self._request.return_token_ids:
            return
        if isinstance(answer, ChatCompletion):
            (answer.prompt_token_ids,) = prompts
        else:
            for choice in answer.choices:
                choice.prompt_token_ids = prompts[choice.index // self._request.n]

    def _choice(self, delta: Delta, *, is_whole: bool = False) -> ChatChoice | CompletionChoice:
        """Return a choice of an answer, or of a chunk."""
        num_top = self._request.num_top_logprobs if delta.tokens else None
        choice: ChatChoice | CompletionChoice
        if self._is_chat:
            choice = ChatChoice()
            if num_top is not None:
                choice.logprobs = chat_logprobs(delta, self._tokenizer, num_top)
            if is_whole:
                choice.message = ChatText(role="assistant", content=delta.text, refusal=None)
            else:
                has_text = delta.text or not delta.finish_reason
                choice.delta = ChatText(content=delta.text) if has_text else ChatText()
        else:
            choice = CompletionChoice(text=delta.text)
            if num_top is not None:
                choice.logprobs = completion_logprobs(delta, self._tokenizer, num_top)
        choice.index, choice.finish_reason = delta.index, delta.finish_reason
        choice.stop_reason = delta.stop_reason
        if self._request.return_token_ids:
            choice.token_ids = [token.token_id for token in delta.tokens]
        return choice


def completion_logprobs(delta: Delta, tokenizer: TextTokenizer, num_top: int) -> CompletionLogprobs:
    """Return the log probabilities of a delta's tokens.

    The drawn token is always among the top ones, so there may be ``num_top + 1``.
    """

    def top(token: TokenOutput) -> dict[str, float] | None:
        if not num_top:
            return None
        logprobs = dict(token.top_logprobs[:num_top])
        if token.logprob is not None:
            logprobs.setdefault(token.token_id, token.logprob)
        return {
            tokenizer.token_name(token_id): max(logprob, _LOWEST)
            for token_id, logprob in logprobs.items()
        }

    return CompletionLogprobs(
        tokens=[tokenizer.token_name(token.token_id) for token in delta.tokens],
        token_logprobs=[
            None if token.logprob is None else max(token.logprob, _LOWEST) for token in delta.tokens
        ],
        top_logprobs=list(map(top, delta.tokens)),
        text_offset=list(delta.text_offsets),
    )


def chat_logprobs(delta: Delta, tokenizer: TextTokenizer, num_top: int) -> ChatLogprobs:
    """Return the log probabilities of a delta's tokens, with their bytes."""

    def named(token_id: int, logprob: float | None) -> TokenLogprob:
        return TokenLogprob(
            token=tokenizer.token_name(token_id),
            logprob=_LOWEST if logprob is None else max(logprob, _LOWEST),
            bytes=list(tokenizer.token_bytes(token_id)),
        )

    content = []
    for token in delta.tokens:
        content.append(named(token.token_id, token.logprob))
        content[-1].top_logprobs = [named(*top) for top in token.top_logprobs[:num_top]]
    return ChatLogprobs(content=content)
