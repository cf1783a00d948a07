"""Writes one request's answer or stream to its client."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from pdlaunch.engine.server.choice import Delta
from pdlaunch.engine.server.prepare import Prepared
from pdlaunch.engine.server.render import Renderer
from pdlaunch.engine.server.running_choices import RunningChoices
from pdlaunch.errors import RequestError
from pdlaunch.http.limits import Deadline
from pdlaunch.http.sse import DONE, ClientStream, encode_event
from pdlaunch.observe.metrics import RequestClock
from pdlaunch.observe.spans import SpanLog
from pdlaunch.protocol.openai.responses import REPORT_KEY, Usage

_log = logging.getLogger(__name__)


class Answerer:
    """Writes the answer of one request; ``running`` has been started."""

    def __init__(
        self,
        http: web.Request,
        headers: Mapping[str, str],
        prepared: Prepared,
        renderer: Renderer,
        running: RunningChoices,
        clock: RequestClock,
        deadline: Deadline,
        spans: SpanLog | None = None,
    ) -> None:
        """``spans``: what the caller is told, behind the answer; None: nothing."""
        self._http = http
        self._headers = headers
        self._prepared = prepared
        self._renderer = renderer
        self._running = running
        self._clock = clock
        self._deadline = deadline
        self._spans = spans
        self.broke_off = False
        """A stream has ended with an error."""

    async def answer(self) -> web.StreamResponse:
        """Write one JSON body. Raises RequestError, or ConnectionError when the client did not take
        it.
        """
        async with self._deadline.guard():
            deltas = await self._collect()
            params: dict[str, Any] | UnsetType | None = UNSET
            if self._prepared.is_remote_prefill:
                params = self._running.hand_over(deltas)
            body = msgspec.json.encode(self._renderer.answer(deltas, self._running.usage(), params))
            if self._spans is not None:
                # Into the object that is written already: no other caller's answer has the member.
                report = msgspec.json.encode(self._spans.report())
                body = b'%s,"%s":%s}' % (body[:-1], REPORT_KEY.encode(), report)
            response = web.Response(
                body=body, content_type="application/json", headers=self._headers
            )
            # Written here and not after the handler's return, so that its caller knows when nobody
            # took the answer.
            await response.prepare(self._http)
            await response.write_eof()
        return response

    async def stream(self) -> web.StreamResponse:
        """Write server-sent events. Raises RequestError before the first one; later errors are
        events.
        """
        stream = ClientStream(self._http, self._headers)
        try:
            async with self._deadline.guard():
                async for events in self._events():
                    await stream.write(events)
                await stream.end(self._last_events())
        except ConnectionError:
            raise
        except Exception as error:
            if not stream.has_begun:
                raise
            self.broke_off = True
            if isinstance(error, RequestError):
                _log.warning("stream failed: %s", error)
            await stream.fail(error)
        return stream.response

    async def _collect(self) -> list[Delta]:
        """Return everything of each choice."""
        whole = [Delta(choice.index) for choice in self._running.choices]
        async for deltas in self._deltas():
            for delta in deltas:
                whole[delta.index].add(delta)
        for choice, delta in zip(self._running.choices, whole, strict=True):
            delta.finish_reason, delta.stop_reason = choice.finish_reason, choice.stop_reason
        return whole

    async def _deltas(self) -> AsyncIterator[Sequence[Delta]]:
        """Yield what was known before the engine began, then what comes."""
        if self._prepared.deltas:
            yield self._prepared.deltas
        async for deltas in self._running.deltas():
            for delta in deltas:
                self._clock.tokens(delta.index, len(delta.tokens))
            yield deltas

    async def _events(self) -> AsyncIterator[bytes]:
        """Yield the stream but for its end, in pieces; each piece is what has come at once."""
        opening = [] if self._prepared.continues else self._renderer.opening(self._usage())
        async for deltas in self._deltas():
            chunks = opening + [self._chunk(delta) for delta in deltas if self._is_shown(delta)]
            opening = []
            if chunks:
                yield b"".join(map(encode_event, chunks))

    def _last_events(self) -> bytes:
        end = DONE
        if self._renderer.request.include_usage:
            end = encode_event(self._renderer.usage_chunk(self._running.usage())) + end
        if self._spans is not None:
            end = (
                end.removesuffix(DONE)
                + encode_event({"choices": [], REPORT_KEY: self._spans.report()})
                + DONE
            )
        return end

    def _chunk(self, delta: Delta) -> object:
        return self._renderer.chunk(delta, self._usage())

    def _usage(self) -> Usage | UnsetType:
        """Return what a chunk says of the tokens so far."""
        return self._running.usage() if self._renderer.request.continuous_usage else UNSET

    def _is_shown(self, delta: Delta) -> bool:
        """Tell whether a delta makes a chunk.

        Tokens whose text is held back do so only where the client asked for more than text.
        """
        request = self._renderer.request
        if delta.text or delta.finish_reason is not None:
            return True
        return bool(delta.tokens) and (
            request.return_token_ids or request.num_top_logprobs is not None
        )
