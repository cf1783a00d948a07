"""Runs the choices of one HTTP request at rank 0, up to the last token or the abort."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from pdlaunch.engine.server.choice import Choice, Delta
from pdlaunch.engine.server.rank_link import RankEvent, RankLink, RankLost
from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.errors import RANK_LOST, WITHDRAWN_CODE
from pdlaunch.observe.spans import SpanLog, SpanReport
from pdlaunch.protocol.engine import WITHDRAWN, RequestFinished, SetReaders, Tokens
from pdlaunch.protocol.ids import RequestId
from pdlaunch.protocol.kv_params import FirstToken, PdlaunchParams, RemoteKV, to_wire
from pdlaunch.protocol.openai.responses import PromptTokensDetails, Usage


class RunningChoices:
    """Runs the choices of one HTTP request.

    Choices that already have a ``finish_reason`` do not run. ``num_prompt_tokens``: of all prompts
    together.
    """

    def __init__(
        self,
        link: RankLink,
        choices: Sequence[Choice],
        *,
        num_prompt_tokens: int,
        spans: SpanLog | None = None,
    ) -> None:
        self._link = link
        self._spans = spans or SpanLog()
        self._sent_at = 0.0
        self.choices = list(choices)
        self._running = {
            choice.request.request_id: choice for choice in choices if choice.finish_reason is None
        }
        self._submitted: set[RequestId] = set()
        self._events: asyncio.Queue[RankEvent] = asyncio.Queue()
        self._aborted: dict[RequestId, Choice] = {}
        self.ended = asyncio.Event()
        """Set once nothing more comes of choices that were aborted."""
        self._num_prompt_tokens = num_prompt_tokens
        self._remote_kv: RemoteKV | None = None

    def start(self) -> None:
        """Submit the choices.

        Raises RequestError when one of the ids is in use: that request is somebody else's, and is
        left alone.
        """
        self._sent_at = self._spans.clock()
        for request_id, choice in self._running.items():
            self._link.submit(choice.request, self._events.put_nowait)
            self._submitted.add(request_id)
        for choice in self.choices:
            if choice.is_over() and choice.request.remote_kv is not None:
                self._give_up_lease(choice)

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """Yield what is new, until every choice has ended; all that has arrived comes at once.

        Raises OverloadedError (503) when the rank is lost, RequestError (500) when it failed; then
        abort is up to the caller.
        """
        while self._running:
            # All that has come makes one write: at high load a step's tokens wait for each other.
            events = [await self._events.get()]
            while not self._events.empty():
                events.append(self._events.get_nowait())
            deltas = [delta for event in events if (delta := self._take(event)) is not None]
            if deltas:
                yield deltas

    def abort(self) -> None:
        """Drop what still runs; its spans are still taken. Safe to call at any time."""
        for request_id in self._submitted & self._running.keys():
            if self._link.abort(request_id, self._take_last):
                self._aborted[request_id] = self._running[request_id]
        while not self._events.empty():  # What came last, and nobody has heard.
            event = self._events.get_nowait()
            if isinstance(event, Tokens | RequestFinished) and event.request_id in self._running:
                self._hear(self._running[event.request_id], event.spans)
        self._running = {}
        if not self._aborted:
            self.ended.set()

    def _take_last(self, event: RankEvent) -> None:
        if isinstance(event, Tokens | RequestFinished):
            self._hear(self._aborted[event.request_id], event.spans)
        if isinstance(event, RequestFinished | RankLost):
            self._aborted.pop(event.request_id, None)
            if not self._aborted:
                self.ended.set()

    def withdraw(self) -> None:
        """Give the choices up if rank 0 has not begun any; then they end with an error."""
        if len(self._running) == len(self.choices):
            self._link.withdraw(list(self._running))

    def release(self) -> None:
        """End the lease of a remote prefill that nobody will pull, also when it has not been
        granted yet.
        """
        if (lease_id := self.choices[0].request.request_id) in self._submitted:
            self._link.abort(lease_id)

    def hand_over(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        """Return the ``kv_transfer_params`` of a finished remote prefill.

        ``deltas``: the first token of each choice.
        """
        return _hand_over(self._link, self.choices, deltas, self._remote_kv)

    def usage(self) -> Usage:
        """Return the tokens so far; cached ones are those of each prompt's first choice."""
        completion = sum(choice.num_tokens for choice in self.choices)
        cached = sum(
            choice.num_cached_tokens
            for choice in self.choices
            if choice.request.sampling.choice == 0
        )
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=completion,
            total_tokens=self._num_prompt_tokens + completion,
            prompt_tokens_details=PromptTokensDetails(cached),
        )

    def _give_up_lease(self, choice: Choice) -> None:
        """Let the prefill side know that this reader needs no blocks.

        It waits for each reader; the rank tells it so for a request that comes and goes.
        """
        self._link.submit(choice.request, lambda _: None)
        self._link.abort(choice.request.request_id)

    def _take(self, event: RankEvent) -> Delta | None:
        choice = self._running.get(event.request_id)
        if choice is None:
            return None
        match event:
            case RankLost():
                raise OverloadedError("the engine is restarting", status=503, code=RANK_LOST)
            case Tokens(tokens=tokens):
                self._hear(choice, event.spans)
                delta = choice.take(tokens)
            case RequestFinished():
                delta = self._take_end(choice, event)
        if choice.finish_reason is not None:
            self._end(choice, event)
        return delta

    def _hear(self, choice: Choice, report: SpanReport | None) -> None:
        """Take what rank 0 tells of a choice; only of several choices it matters which."""
        if report is None:
            return
        if len(self.choices) > 1:
            for span in report.spans:
                span.attributes["choice"] = choice.index
        self._spans.take(report, sent_at=self._sent_at, received_at=self._spans.clock())

    def _take_end(self, choice: Choice, event: RequestFinished) -> Delta:
        self._hear(choice, event.spans)
        if event.reason in ("error", "abort"):
            self._submitted.discard(event.request_id)  # rank 0 has nothing of ours under this id
            if event.error == WITHDRAWN:
                raise OverloadedError(WITHDRAWN, status=503, code=WITHDRAWN_CODE)
            if event.error is not None and event.error_param is not None:
                raise RequestError(event.error, param=event.error_param)
            raise RequestError(
                event.error or "the engine aborted the request", status=500, code="engine_error"
            )
        choice.num_cached_tokens = event.num_cached_tokens
        self._remote_kv = event.remote_kv or self._remote_kv
        return choice.take(event.tokens, event)

    def _end(self, choice: Choice, event: RankEvent) -> None:
        del self._running[choice.request.request_id]
        if not isinstance(event, RequestFinished):
            self._link.abort(choice.request.request_id)


def _hand_over(
    link: RankLink, choices: Sequence[Choice], deltas: Sequence[Delta], remote: RemoteKV | None
) -> dict[str, Any] | None:
    """Return the ``kv_transfer_params`` of the answer.

    None when every choice ended with its first token; then the lease ends too. Without leased
    blocks the decode engine gets the first tokens alone and computes the prompt itself.
    """
    lease_id = choices[0].request.request_id
    num_open = sum(choice.finish_reason != "stop" for choice in choices)
    if num_open == 0:
        link.abort(lease_id)
        return None
    if num_open < len(choices) and remote is not None:
        link.send(SetReaders(request_id=lease_id, num_readers=num_open))
    first_tokens = PdlaunchParams(first_tokens=[_first_token(delta) for delta in deltas])
    if remote is None:
        return {
            "do_remote_prefill": False,
            "do_remote_decode": False,
            "pdlaunch": msgspec.to_builtins(first_tokens),
        }
    return to_wire(remote, first_tokens)


def _first_token(delta: Delta) -> FirstToken:
    (token,) = delta.tokens
    return FirstToken(
        token_id=token.token_id,
        finish_reason="stop" if delta.finish_reason == "stop" else None,
        logprob=token.logprob,
        top_logprobs=list(token.top_logprobs),
    )
