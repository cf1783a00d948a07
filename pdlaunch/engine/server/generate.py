"""Answers /v1/completions and /v1/chat/completions: read, prepare, generate, answer or stream.

::

    body -> request model -> prompts -> choices -> rank 0 -> deltas -> chunks, or one answer

If the client disconnects, the handler is cancelled; its end aborts all choices that still run.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from pdlaunch.engine.server.choice import Delta
from pdlaunch.engine.server.engine_service import EngineService
from pdlaunch.engine.server.generation import Call, Generation
from pdlaunch.engine.server.served_model import ServedModel
from pdlaunch.engine.server.structured import grammar_of, whole_calls
from pdlaunch.engine.server.text import TextTokenizer
from pdlaunch.errors import PdlaunchError, RequestError
from pdlaunch.http.app import request_id_of
from pdlaunch.http.headers import (
    ORIGIN_HEADER,
    REQUEST_ID_HEADER,
    SPANS_HEADER,
    ignored_fields_header,
    read_origin,
)
from pdlaunch.http.limits import LARGE_BODY_BYTES, LARGE_TEXT_BYTES, Deadline, Grow, work_at_input
from pdlaunch.http.sse import DONE, ClientStream, encode_event
from pdlaunch.observe.metrics import RequestClock
from pdlaunch.observe.spans import SpanLog
from pdlaunch.protocol.ids import HopId
from pdlaunch.protocol.kv_params import TokenOutput
from pdlaunch.protocol.openai import responses
from pdlaunch.protocol.openai.requests import ChatCompletionRequest, CompletionRequest

_log = logging.getLogger(__name__)

R = TypeVar("R", CompletionRequest, ChatCompletionRequest)


async def generate(service: EngineService, http: web.Request, kind: type[R]) -> web.StreamResponse:
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
        async with deadline():
            request, prompts = await _read(service, http, kind, grow, call.spans)
            # In a thread: a schema may take a second.
            needs_grammar = request.is_constrained
            grammar = await work_at_input(needs_grammar, partial(grammar_of, request))
        link, model, has_peers = service.live_link(), service.model, service.spec.has_peers
        with contextlib.ExitStack() as compiling:
            if grammar:
                compiling.enter_context(service.admit_grammar(grammar))
            generation = Generation(
                link,
                call,
                request,
                prompts,
                model,
                has_peers=has_peers,
                grammar=grammar,
                on_events=compiling.close,
            )
            return await _run(service, http, generation, deadline)


async def _read(
    service: EngineService, http: web.Request, kind: type[R], grow: Grow, spans: SpanLog
) -> tuple[R, list[list[int]]]:
    """Return the request and the token ids of its prompts. Takes a place for each choice."""
    async with service.bodies.read(http) as raw:
        model = service.model
        request = await work_at_input(len(raw) >= LARGE_BODY_BYTES, partial(model.read, kind, raw))
        num_prompts = len(request.prompt) if isinstance(request, CompletionRequest) else 1
        grow(num_prompts * request.n, "n" if num_prompts == 1 else "prompt")
        spans.add("receive", spans.start_at, bytes=len(raw))
        with spans.measure("tokenize") as attributes:
            prompts = await work_at_input(
                len(raw) >= LARGE_TEXT_BYTES, partial(model.prompts, request)
            )
            attributes["tokens"] = sum(map(len, prompts))
        return request, prompts


async def _run(
    service: EngineService, http: web.Request, generation: Generation, deadline: Deadline
) -> web.StreamResponse:
    """Answer; then abort unfinished choices, and release a lease whose answer was not written."""
    metrics, request, call = service.metrics, generation.request, generation.call
    choices = generation.choices
    clock = RequestClock(metrics.requests)
    metrics.asked(generation.num_prompt_tokens)
    headers = {REQUEST_ID_HEADER: call.hop_id} | ignored_fields_header(request.ignored_fields)
    writer = AnswerWriter(generation, service.model, clock)
    answered = False
    otherwise = "abort"  # counted for choices without a finish reason: the client has gone away
    try:
        generation.start()
        if request.stream:
            response, answered = await _stream(http, headers, writer, deadline)
            otherwise = "abort" if answered else "error"
        else:
            async with deadline():
                body = await writer.whole()
                response = web.Response(body=body, content_type="application/json", headers=headers)
                # Written here, not by aiohttp after the handler, so that a failure is seen.
                await response.prepare(http)
                await response.write_eof()
            answered = True
    except PdlaunchError:
        otherwise = "error"
        raise
    finally:
        metrics.ended(choices, otherwise)
        generation.abort()
        if not answered and generation.is_remote_prefill:
            generation.release()
    if generation.is_remote_prefill:
        service.remember_lease(call.hop_id, choices[0].request.request_id)
    num_output = sum(choice.num_tokens for choice in choices)
    clock.end(num_output)
    _log.info(
        "prompt_tokens=%d completion_tokens=%d finish_reason=%s",
        generation.num_prompt_tokens,
        num_output,
        ",".join(str(choice.finish_reason) for choice in choices),
    )
    return response


async def _stream(
    http: web.Request, headers: dict[str, str], writer: AnswerWriter, deadline: Deadline
) -> tuple[web.StreamResponse, bool]:
    """Write server-sent events; return False with the response if the stream failed. Raises
    RequestError before the first event; later errors are events.
    """
    stream = ClientStream(http, headers)
    try:
        async with deadline():
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


class AnswerWriter:
    """Builds the answer of one request, whole or as a stream, while ``generation`` runs."""

    def __init__(self, generation: Generation, model: ServedModel, clock: RequestClock) -> None:
        call, self._request = generation.call, generation.request
        self._generation = generation
        self._tokenizer = model.tokenizer
        self._clock = clock
        # Spans to send after the answer, if the caller wants them.
        self._spans = call.spans if call.wants_spans else None
        self._is_chat = isinstance(generation.request, ChatCompletionRequest)
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl-' if self._is_chat else 'cmpl-'}{call.hop_id}",
            "created": int(time.time()),
            "model": model.name,
        }

    async def whole(self) -> bytes:
        """Return the answer as one JSON body. Raises RequestError."""
        generation = self._generation
        whole = [Delta(choice.index) for choice in generation.choices]
        async for deltas in generation.deltas(self._clock):
            for delta in deltas:
                whole[delta.index].add(delta)
        for choice, delta in zip(generation.choices, whole, strict=True):
            delta.finish_reason, delta.stop_reason = choice.finish_reason, choice.stop_reason
        answer = self._new(whole, is_whole=True, names_prompts=True)
        answer.usage = generation.usage()
        if generation.is_remote_prefill:
            answer.kv_transfer_params = generation.hand_over(whole)
        body = msgspec.json.encode(answer)
        if self._spans is None:
            return body
        # Added to the encoded object, because answers to other callers never have this member.
        report = msgspec.json.encode(self._spans.report())
        return b'%s,"%s":%s}' % (body[:-1], responses.REPORT_KEY.encode(), report)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the stream without its last events; a piece holds all that arrived together."""
        chunks = [] if self._generation.continues else self._opening()
        async for deltas in self._generation.deltas(self._clock):
            for delta in deltas:
                if self._is_shown(delta):
                    chunks.append(self._new([delta]))
                    chunks[-1].usage = self._usage_so_far()
            if chunks:
                yield b"".join(map(encode_event, chunks))
            chunks = []

    def last_events(self) -> bytes:
        end = b""
        if self._request.stream_options.include_usage:
            last = self._new([])
            last.usage = self._generation.usage()
            end += encode_event(last)
        if self._spans is not None:
            end += encode_event({"choices": [], responses.REPORT_KEY: self._spans.report()})
        return end + DONE

    def _is_shown(self, delta: Delta) -> bool:
        # Tokens without text become a chunk only if the client wants token ids or logprobs.
        wants_tokens = self._request.return_token_ids or self._request.num_top_logprobs is not None
        has_output = delta.text or delta.tool_calls or delta.finish_reason or delta.prompt
        return bool(has_output or (delta.tokens and wants_tokens))

    def _opening(self) -> list[responses.ChatCompletion | responses.Completion]:
        """Return the chunks before any text: the role of every choice, the prompts' token ids."""
        num_choices = self._request.n
        if self._is_chat:
            chunk = self._new([Delta(index) for index in range(num_choices)], names_prompts=True)
            for choice in chunk.choices:
                assert isinstance(choice, responses.ChatChoice)
                choice.delta = responses.ChatText(role="assistant", content="")
                choice.token_ids = UNSET
        elif self._request.return_token_ids:
            firsts = range(0, num_choices * len(self._generation.prompts), num_choices)
            chunk = self._new([Delta(index) for index in firsts], names_prompts=True)
        else:
            return []
        chunk.usage = self._usage_so_far()
        return [chunk]

    def _usage_so_far(self) -> responses.Usage | UnsetType:
        options = self._request.stream_options
        is_wanted = options.include_usage and options.continuous_usage_stats
        return self._generation.usage() if is_wanted else UNSET

    def _new(
        self, deltas: Sequence[Delta], *, is_whole: bool = False, names_prompts: bool = False
    ) -> responses.ChatCompletion | responses.Completion:
        request, prompts = self._request, self._generation.prompts
        names_prompts = names_prompts and request.return_token_ids
        if not self._is_chat:
            choices = list(map(self._completion_choice, deltas))
            for choice in choices if names_prompts else ():
                choice.prompt_token_ids = prompts[choice.index // request.n]
            return responses.Completion(**self._head, choices=choices)
        answer = responses.ChatCompletion(
            **self._head, choices=[self._chat_choice(delta, is_whole) for delta in deltas]
        )
        if not is_whole:
            answer.object = "chat.completion.chunk"
        if names_prompts:
            (answer.prompt_token_ids,) = prompts
        if deltas and deltas[0].prompt:
            answer.prompt_logprobs = prompt_logprobs(deltas[0].prompt, self._tokenizer)
        return answer

    def _completion_choice(self, delta: Delta) -> responses.CompletionChoice:
        choice = responses.CompletionChoice(text=delta.text, **self._common(delta))
        request = self._request
        assert isinstance(request, CompletionRequest)
        if request.num_top_logprobs is not None and (delta.tokens or delta.prompt):
            echoed = delta.prompt if request.echo else []
            choice.logprobs = completion_logprobs(
                delta, self._tokenizer, request.num_top_logprobs, echoed
            )
        if request.prompt_logprobs is not None and delta.prompt:
            choice.prompt_logprobs = prompt_logprobs(delta.prompt, self._tokenizer)
        return choice

    def _chat_choice(self, delta: Delta, is_whole: bool) -> responses.ChatChoice:
        choice = responses.ChatChoice(**self._common(delta))
        num_top = self._request.num_top_logprobs
        if delta.tokens and num_top is not None:
            choice.logprobs = chat_logprobs(delta, self._tokenizer, num_top)
        if is_whole:
            choice.message = responses.ChatText(role="assistant", content=delta.text, refusal=None)
            if delta.tool_calls:
                choice.message.content = delta.text or None
                choice.message.tool_calls = whole_calls(delta.tool_calls)
        else:
            has_text = delta.text or not (delta.finish_reason or delta.tool_calls)
            choice.delta = (
                responses.ChatText(content=delta.text) if has_text else responses.ChatText()
            )
            choice.delta.tool_calls = delta.tool_calls or UNSET
        return choice

    def _common(self, delta: Delta) -> dict[str, Any]:
        tokens = [token.token_id for token in delta.tokens]
        return {
            "index": delta.index,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "token_ids": tokens if self._request.return_token_ids else UNSET,
        }


def completion_logprobs(
    delta: Delta, tokenizer: TextTokenizer, num_top: int, echoed: Sequence[TokenOutput] = ()
) -> responses.CompletionLogprobs:
    """Return the log probabilities of a delta's tokens, after those of the ``echoed`` prompt."""

    def top(token: TokenOutput) -> dict[str, float] | None:
        if not num_top or token.logprob is None:
            return None
        logprobs = dict(token.top_logprobs[:num_top])
        logprobs.setdefault(token.token_id, token.logprob)  # so there may be ``num_top + 1``
        return {tokenizer.token_name(token_id): value for token_id, value in logprobs.items()}

    tokens = [*echoed, *delta.tokens]
    names = [tokenizer.token_name(token.token_id) for token in tokens]
    sizes = map(len, names[: len(echoed)])
    return responses.CompletionLogprobs(
        tokens=names,
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=list(map(top, tokens)),
        text_offset=[*list(accumulate(sizes, initial=0))[: len(echoed)], *delta.text_offsets],
    )


def prompt_logprobs(
    prompt: Sequence[TokenOutput], tokenizer: TextTokenizer
) -> responses.PromptLogprobs:
    """Return for each prompt token the log probabilities of the likeliest tokens and its own."""

    def told(token: TokenOutput) -> dict[str, responses.PromptLogprob] | None:
        if token.logprob is None:
            return None
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top_logprobs, 1)}
        return {
            str(token_id): responses.PromptLogprob(
                logprob, ranks.get(token_id), tokenizer.token_name(token_id)
            )
            for token_id, logprob in {
                **dict(token.top_logprobs),
                token.token_id: token.logprob,
            }.items()
        }

    return list(map(told, prompt))


_LOWEST = -9999.0  # JSON has no minus infinity; the value that OpenAI uses


def chat_logprobs(delta: Delta, tokenizer: TextTokenizer, num_top: int) -> responses.ChatLogprobs:
    """Return the log probabilities of a delta's tokens, with their bytes."""

    def named(token_id: int, logprob: float | None) -> responses.TokenLogprob:
        return responses.TokenLogprob(
            token=tokenizer.token_name(token_id),
            logprob=_LOWEST if logprob is None else logprob,
            bytes=list(tokenizer.token_bytes(token_id)),
        )

    content = []
    for token in delta.tokens:
        content.append(named(token.token_id, token.logprob))
        content[-1].top_logprobs = [named(*top) for top in token.top_logprobs[:num_top]]
    return responses.ChatLogprobs(content=content)
