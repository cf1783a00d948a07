"""Takes one prompt through the engines: prefill, hand over, decode; another engine where one fails.

::

    prefill(max_tokens=1) ── first tokens ──> client
         └ kv_transfer_params ──> decode ── chunks ──> client
                                     └ died: another engine resumes after the tokens so far

A request that only one engine can or need serve goes there at once. Where both can, prefill's
answer is a stream, and decode has been told of the prompt meanwhile (``early_decode.py``). All that
is sent to the client went through the transcript, so that nothing is told twice whichever engine
says it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Coroutine, Iterable
from typing import Any, NamedTuple, Protocol

import msgspec

from pdlaunch.errors import RequestError
from pdlaunch.http.errors import RANK_LOST, WITHDRAWN_CODE
from pdlaunch.http.headers import REQUEST_ID_HEADER
from pdlaunch.protocol.ids import HopId, LeaseId
from pdlaunch.router.client_request import COMPLETIONS, PromptRequest
from pdlaunch.router.continuation import Continuation, StreamLostError, find_text, obstacle
from pdlaunch.router.cost_model import Estimate
from pdlaunch.router.early_decode import EarlyDecode
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_errors import EngineFailure, EngineRefusal, malformed_is_failure
from pdlaunch.router.engine_stream import Chunk, EngineStream
from pdlaunch.router.handover import (
    Handover,
    HandoverStream,
    num_recomputed,
    read_handover,
    whole_chunk,
)
from pdlaunch.router.metrics import EarlyOutcome
from pdlaunch.router.policy import NO_NEEDS, Hop, Need, Route, RoutingRequest, covers
from pdlaunch.router.recovery import Attempts
from pdlaunch.router.request_record import Leg, RequestRecord
from pdlaunch.router.state import RouterState
from pdlaunch.router.takeover import WaitingPrompt
from pdlaunch.router.transcript import Transcript

logger = logging.getLogger(__name__)

_BROKEN = frozenset({"error", "abort"})
"""Reasons with which an engine gives a request up that nobody has cancelled."""
_RESUMES: frozenset[Need] = frozenset({"goes_on"})
_TAKES_FIRST_TOKEN: frozenset[Need] = frozenset({"gives_first_token"})


class ChunkSink(Protocol):
    """Takes the chunks of all prompts of a request."""

    def ignores(self, names: Iterable[str]) -> None:
        """Take the names of fields that an engine has ignored; it comes before any chunk."""

    def routed(self, prompt: PromptRequest, route: Route) -> None:
        """Take the route of a prompt, again when another one is taken."""

    async def chunk(self, prompt: PromptRequest, transcript: Transcript, chunk: Chunk) -> None:
        """Take one chunk that is new to the client."""


class Forecast(NamedTuple):
    """Holds what a route promises of the first token."""

    engine: Engine
    estimate: Estimate
    sent_at: float


class Generation:
    """Answers one prompt; ``run`` once."""

    def __init__(
        self,
        prompt: PromptRequest,
        state: RouterState,
        sink: ChunkSink,
        record: RequestRecord,
    ) -> None:
        self.transcript = Transcript(
            prompt.num_choices, keeps_text=prompt.is_stream and state.pool.has_own_fields
        )
        self._prompt = prompt
        self._state = state
        self._sink = sink
        self._record = record
        self._attempts = Attempts(state)
        self._handover: Handover | None = None
        self._early: EarlyDecode | None = None
        self._first_token_sent = False
        self._decode_has_answered = False
        self._lease_taken = False
        self._handed_over_at = 0.0
        self._first_told_at: float | None = None
        """Instant of the client's first token; None once it has the second one."""
        self._num_decode_attempts = 0
        self._prefix = prompt.prefix
        self._planned: Engine | None = None
        """The engine that the route names for what is left, until it has been asked."""
        self._forecast: Forecast | None = None
        """The route's estimate, until a token has come or an engine has failed."""
        self._unanswered = contextlib.ExitStack()
        self._unanswered_at: Engine | None = None
        """The engine that computes the prompt, until a token has come."""
        self._waiting: WaitingPrompt | None = None

    async def run(self) -> None:
        """Answer the prompt. Raises RequestError, EngineRefusal or EngineFailure.

        Cancelling it ends the work of both engines.
        """
        with self._state.suspects.watch(self._prompt.origin):
            try:
                await self._prefill()
                if self._early is not None:
                    await self._decode_early(self._early)
                while not self.transcript.is_done:
                    await self._decode()
                self._state.pool.answered(self.transcript.num_tokens)
            finally:
                self._unanswered.close()
                self._drop_early()
                self._state.waiting.consider()
                self._release_untaken_lease()
                # Its traceback leads back here: a cycle would keep the body in memory.
                self._attempts.forget()

    async def _prefill(self) -> None:
        """Hand the prompt to a prefill engine; where none can do it, decode will do all."""
        if self._prompt.max_tokens == 1:
            return
        while len(self._attempts.tried) < self._state.recovery.max_attempts:
            route = self._state.pool.route(self._routing_request("prefill"))
            self._record.routed("prefill", route)
            if route.prefill is None and route.decode is None:
                break
            self._follow(route)
            self._state.metrics.routed(route.kind)
            if route.prefill is None:
                return
            if self._attempts.has_failed:
                self._state.metrics.retried("prefill")
                self._record.retries += 1
            try:
                handover = await self._ask_prefill(route.prefill, route.decode)
            except (EngineFailure, EngineRefusal) as failure:
                if self._is_taken_over(failure):
                    return
                if self._attempts.is_final(route.prefill, "prefill", failure):
                    raise
                await self._hear_cause(route.prefill, failure)
                if self.transcript.has_tokens:
                    # The first token is told: decode goes on after it, from a prompt that it
                    # computes itself.
                    return
            else:
                await self._begin_answer(handover)
                return
        if self._state.pool.has_pairs:
            self._state.metrics.fell_back()

    async def _ask_prefill(self, engine: Engine, told_early: Engine | None) -> Handover:
        prompt = self._prompt
        early = self._early = (
            None
            if told_early is None or engine.lender is None
            else EarlyDecode(
                told_early,
                engine.lender,
                prompt,
                self._state.client,
                self._record.leg("decode", told_early.name, early=True),
            )
        )
        try:
            request = self._routing_request("prefill")
            self._count_unanswered(engine, request)
            self._waiting = WaitingPrompt(request=request, prefill=engine, hop_id=prompt.hop_id)
            with (
                self._state.waiting.waits(self._waiting),
                engine.working(num_prompt_tokens=prompt.num_prompt_tokens),
                self._record.leg("prefill", engine.name) as leg,
            ):
                handover = await (
                    self._await_prefill(engine, leg)
                    if early is None
                    else self._stream_prefill(engine, early.lease_id, leg)
                )
        except BaseException as error:
            self._unanswered.close()
            self._drop_early()
            if not isinstance(error, EngineFailure | EngineRefusal):
                # The answer may be on its way, and the lease that it speaks of would wait for its
                # deadline.
                self._release(engine, prompt.hop_id)
            raise
        self._unanswered.close()
        self._state.pool.succeeded(engine)
        self._state.pool.served(engine, self._routing_request("prefill"), 0)
        return handover

    async def _stream_prefill(self, engine: Engine, lease_id: LeaseId, leg: Leg) -> Handover:
        """Tell the client the first token when it is there; its lease may come later."""
        prompt, answer = self._prompt, HandoverStream(engine)
        prompt_token_ids = prompt.wanted_token_ids
        body = prompt.prefill_body(knows_whole_request=True, lease_id=lease_id)
        async with self._state.client.stream(
            engine, prompt.endpoint.path, body, self._headers(attempt=0)
        ) as stream:
            self._sink.ignores(stream.ignored_fields)
            while (chunk := await stream.next_chunk()) is not None:
                with malformed_is_failure(engine):
                    answer.take(chunk)
                    if prompt_token_ids is not None:
                        for choice in chunk["choices"]:
                            choice["prompt_token_ids"] = prompt_token_ids
                if not answer.is_final:
                    self._refuse_too_long(answer.num_prompt_tokens)
                await self._tell(engine, chunk)
            leg.hear(stream.report)
        with malformed_is_failure(engine):
            return answer.handover()

    async def _await_prefill(self, engine: Engine, leg: Leg) -> Handover:
        prompt = self._prompt
        body = prompt.prefill_body(knows_whole_request=engine.capabilities.gives_first_token)
        answer = await self._state.client.ask(
            engine, prompt.endpoint.path, body, self._headers(attempt=0)
        )
        self._sink.ignores(answer.ignored_fields)
        with malformed_is_failure(engine):
            handover = read_handover(engine, answer.body, is_chat=prompt.endpoint.is_chat)
        leg.hear(handover.report)
        if handover.work is not None:
            self._state.client.hear(engine, handover.work)
        for chunk in handover.chunks:
            _refuse_broken(engine, chunk)
        return handover

    async def _begin_answer(self, handover: Handover) -> None:
        """Tell the client what prefill knows, if the decode engines need not tell it again."""
        self._handover = handover
        self._handed_over_at = self._state.now()
        self._attempts.begin_decode()
        if handover.engine.capabilities.needs_proof:
            self.transcript.note_prefill(handover.usage)
        # Before anything is sent: this is the last moment for a status.
        if not handover.is_final:
            self._refuse_too_long(handover.num_prompt_tokens)
        # The client gets the first token from prefill only if decode need not say it again.
        self._first_token_sent = (handover.is_final or self.transcript.has_tokens) or (
            handover.has_first_tokens and self._state.pool.has_ready("decode", _TAKES_FIRST_TOKEN)
        )
        if self._first_token_sent:
            for chunk in handover.chunks:
                await self._tell(handover.engine, chunk)
        goes_on = self._first_token_sent and not handover.is_final
        if self._early is not None and not (goes_on and handover.lease_id == self._early.lease_id):
            self._drop_early()

    async def _decode_early(self, early: EarlyDecode) -> None:
        """Stream from the engine that knows the prompt already, unless it has nothing to say."""
        try:
            stream = await early.stream()
        except (EngineFailure, EngineRefusal) as failure:
            logger.info("told of the prompt in vain: %s", str(failure))
            self._drop_early()
            await self._hear_cause(early.engine, failure)
            return
        self._num_decode_attempts += 1
        self._note_path(early.engine)
        try:
            await self._attempt(
                early.engine, self._relay(early.engine, stream, early.leg, pulls=True)
            )
        finally:
            self._drop_early("used")

    def _drop_early(self, outcome: EarlyOutcome = "dropped") -> None:
        early, self._early = self._early, None
        if early is not None:
            self._state.metrics.told_early(outcome)
            early.leg.was_dropped |= outcome == "dropped"
            self._state.spawn(early.close())

    async def _decode(self) -> None:
        """Stream from one engine, for as long as it lives; what failed is noted for the next."""
        engine = self._take_planned() or await self._attempts.next_engine(
            lambda: self._routing_request("decode"),
            on_route=lambda route: self._record.routed("decode", route),
            has_begun=self.transcript.has_tokens,
            may_wait=self._handover is not None,
        )
        if not self.transcript.has_tokens and self._forecast is None:
            self._sink.routed(self._prompt, Route(reason="least work", decode=engine))
        attempt = self._num_decode_attempts
        self._num_decode_attempts += 1
        if attempt:
            self._state.metrics.retried("decode")
            self._record.retries += 1
        await self._attempt(engine, self._stream_from(engine, attempt))

    async def _attempt(self, engine: Engine, work: Coroutine[Any, Any, None]) -> None:
        """Await ``work``. Raises its failure when no other attempt can make up for it."""
        try:
            await work
        except (EngineFailure, EngineRefusal) as failure:
            self._unanswered.close()
            if self.transcript.is_done:
                return
            if self._attempts.is_final(engine, "decode", failure):
                raise
            await self._hear_cause(engine, failure)
            self._refuse_lost(engine)
            if self._attempts.exhausts_decode(engine, failure) or not self._can_go_on():
                raise

    async def _hear_cause(self, engine: Engine, failure: EngineFailure | EngineRefusal) -> None:
        """Learn whether the engine died of this request before another one gets it.

        Raises KillsEngineError if it did, and not for the first time.
        """
        if isinstance(failure, EngineFailure) and failure.engine_code == RANK_LOST:
            await self._state.news_of_death(engine)
        self._state.suspects.check(self._prompt.origin)

    def _refuse_lost(self, engine: Engine) -> None:
        """Raise StreamLostError for a stream that engines like this one cannot go on with."""
        if self._must_resume() and engine.capabilities.has_own_fields:
            reason = obstacle(self._prompt, self.transcript, engine.capabilities)
            if reason:
                raise self._lost(engine, reason)

    def _lost(self, engine: Engine, reason: str) -> StreamLostError:
        self._state.metrics.lost_stream(reason)
        return StreamLostError(engine.name, reason)

    async def _stream_from(self, engine: Engine, attempt: int) -> None:
        prompt = self._prompt
        if self._must_resume():
            self._state.metrics.migrated()
            logger.info("goes on at %s after %d tokens", engine.name, self.transcript.num_tokens)
            if not engine.capabilities.resumes:
                await self._continue_at(engine, attempt)
                return
        extra = self._decode_extra(engine)
        pulls = bool(extra.get("kv_transfer_params", {}).get("do_remote_prefill"))
        if pulls:
            self._note_path(engine)
        if engine.capabilities.has_own_fields and not prompt.is_stream:
            await self._ask_whole(engine, prompt.whole_body(extra), attempt, pulls=pulls)
            return
        body = prompt.decode_body(extra)
        if not extra:
            self._count_unanswered(engine, self._routing_request("decode"))
        with (
            engine.working(
                num_prompt_tokens=prompt.num_prompt_tokens, num_streams=prompt.num_choices
            ),
            self._record.leg("decode", engine.name) as leg,
        ):
            async with self._state.client.stream(
                engine, prompt.endpoint.path, body, self._headers(attempt)
            ) as stream:
                self._sink.ignores(stream.ignored_fields)
                await self._relay(engine, stream, leg, pulls=pulls)

    async def _ask_whole(self, engine: Engine, body: bytes, attempt: int, *, pulls: bool) -> None:
        """Have the engine make the answer whole: some of it is not told in streams."""
        prompt = self._prompt
        with (
            engine.working(
                num_prompt_tokens=prompt.num_prompt_tokens, num_streams=prompt.num_choices
            ),
            self._record.leg("decode", engine.name),
        ):
            answer = await self._state.client.ask(
                engine, prompt.endpoint.path, body, self._headers(attempt)
            )
        self._sink.ignores(answer.ignored_fields)
        with malformed_is_failure(engine):
            chunk = whole_chunk(msgspec.json.decode(answer.body))
        self._check_pulled(engine, chunk, pulls=pulls)
        await self._tell(engine, chunk)
        self._state.pool.succeeded(engine)

    async def _continue_at(self, engine: Engine, attempt: int) -> None:
        """Have the engine go on behind the tokens so far, which it gets as a prompt."""
        prompt, transcript, client = self._prompt, self.transcript, self._state.client

        async def detokenize(token_ids: list[int]) -> str:
            body = msgspec.json.encode({"model": prompt.body.get("model"), "tokens": token_ids})
            answer = await client.ask(engine, "/detokenize", body, prompt.headers)
            return str(msgspec.json.decode(answer.body)["prompt"])

        told = transcript.text
        try:
            text, num_tokens = await find_text(
                detokenize, transcript.prompt_token_ids, transcript.output_token_ids, told
            )
            if num_tokens < len(transcript.output_token_ids):
                if prompt.tells_tokens:
                    raise LookupError("half a character")
                transcript.drop_tokens(num_tokens)
            continuation = Continuation(
                prompt,
                transcript.prompt_token_ids,
                list(transcript.output_token_ids),
                text=text,
                num_told=len(told),
                text_offset=transcript.text_offset,
            )
            body = continuation.body(engine.max_model_len)
        except LookupError as error:
            raise self._lost(engine, str(error.args[0])) from error
        with (
            engine.working(num_prompt_tokens=prompt.num_prompt_tokens, num_streams=1),
            self._record.leg("decode", engine.name),
        ):
            async with client.stream(
                engine, COMPLETIONS.path, body, self._headers(attempt)
            ) as stream:
                # A stop string across the seam ends it before the engine does.
                while not transcript.is_done and (chunk := await stream.next_chunk()) is not None:
                    with malformed_is_failure(engine):
                        _refuse_broken(engine, chunk)
                        continued = continuation.take(chunk)
                    await self._tell(engine, continued)
                if not transcript.is_done:
                    raise EngineFailure(engine, "its stream ended too early")
        self._state.pool.succeeded(engine)

    def _check_pulled(self, engine: Engine, chunk: Chunk, *, pulls: bool) -> None:
        """Report a pair whose decode engine has computed what it was handed blocks of."""
        if pulls and self._handover is not None and engine.capabilities.needs_proof:
            with malformed_is_failure(engine):
                num_tokens = num_recomputed(chunk)
            if num_tokens:
                self._state.recomputed(self._handover.engine, engine, num_tokens)

    async def _relay(self, engine: Engine, stream: EngineStream, leg: Leg, *, pulls: bool) -> None:
        """Tell the client all that the engine says.

        ``pulls``: the stream starts only after its pull has ended, so its lease is used up.
        """
        while (chunk := await stream.next_chunk()) is not None:
            self._decode_has_answered = True
            self._lease_taken |= pulls  # a stream that pulls starts after its pull has ended
            self._check_pulled(engine, chunk, pulls=pulls)
            await self._tell(engine, chunk)
        leg.hear(stream.report)
        if not self.transcript.is_done:
            raise EngineFailure(engine, "its stream ended too early")
        self._state.pool.succeeded(engine)
        self._state.pool.served(engine, self._routing_request("decode"), self.transcript.num_tokens)

    def _is_taken_over(self, failure: EngineFailure | EngineRefusal) -> bool:
        """Take the route of the engine for which the prompt was asked back, if it was given."""
        waiting, self._waiting = self._waiting, None
        is_withdrawn = isinstance(failure, EngineFailure) and failure.engine_code == WITHDRAWN_CODE
        if waiting is None or waiting.route is None or not is_withdrawn:
            return False
        self._state.metrics.took_over()
        self._record.routed("decode", waiting.route)
        self._follow(waiting.route)
        return True

    def _follow(self, route: Route) -> None:
        """Note what was chosen for a prompt that nobody has computed."""
        self._sink.routed(self._prompt, route)
        self._planned = route.planned if route.prefill is not None else route.decode
        first = route.prefill or route.decode
        if route.estimate is not None and first is not None:
            self._forecast = Forecast(first, route.estimate, self._state.now())

    def _take_planned(self) -> Engine | None:
        """Return the engine that the route named, once, if it can still be asked."""
        engine, self._planned = self._planned, None
        is_usable = (
            engine is not None and self._state.pool.lists(engine) and not self._must_resume()
        )
        return engine if is_usable else None

    def _count_unanswered(self, engine: Engine, request: RoutingRequest) -> None:
        """Count the prompt as work of the engine until its first token comes."""
        num_tokens = self._state.pool.num_new_tokens(engine, request)
        self._unanswered_at = engine
        self._unanswered.enter_context(engine.computing(num_tokens, self._state.pool.clock))

    def _first_token_is_here(self, engine: Engine) -> None:
        if self._waiting is not None:
            self._state.waiting.begun(self._waiting)
        if self._unanswered_at is not None:
            self._unanswered_at = None
            self._unanswered.close()
            self._state.waiting.consider()
        self._compare(engine)

    def _compare(self, engine: Engine) -> None:
        """Learn from the time that the first token took, if it came as it was meant to."""
        forecast, self._forecast = self._forecast, None
        if forecast is None or forecast.engine is not engine or self._attempts.has_failed:
            return
        took_s = self._state.now() - forecast.sent_at
        if took_s > 0:
            error = abs(forecast.estimate.first_token_s - took_s) / took_s
            self._state.metrics.estimated(forecast.estimate.kind, error)
            engine.experience.observe((1.0, forecast.estimate.computed_s), took_s)

    def _note_path(self, decode: Engine) -> None:
        """Note how the blocks that prefill has handed over come to decode."""
        if self._handover is not None:
            self._record.kv_path = self._state.pool.path(self._handover.engine, decode)

    async def _tell(self, engine: Engine, chunk: Chunk) -> None:
        with malformed_is_failure(engine):
            _refuse_broken(engine, chunk)
            has_news = self.transcript.admit(chunk)
            self._attempts.heard()
        if self.transcript.has_tokens:
            self._first_token_is_here(engine)
        if has_news:
            self._time_second_token(engine)
            await self._sink.chunk(self._prompt, self.transcript, chunk)

    def _time_second_token(self, engine: Engine) -> None:
        """Measure what the hand-over takes of a client's time, where there is one choice."""
        num_tokens = self.transcript.num_tokens
        if num_tokens == 1 and self._prompt.num_choices == 1:
            self._first_told_at = self._first_told_at or self._state.now()
        elif num_tokens > 1 and self._first_told_at is not None:
            told_s, self._first_told_at = self._state.now() - self._first_told_at, None
            if self._handover is not None and self._handover.engine is not engine:
                self._state.metrics.second_token(self._handover.engine.name, engine.name, told_s)

    def _decode_extra(self, engine: Engine) -> dict[str, Any]:
        """Return what the next decode engine is given besides the client's body."""
        if self._must_resume():
            return {"resume": self.transcript.resume_field()}
        if self._handover is None:
            return {}
        if engine.capabilities.needs_proof:
            if not self._may_hand_over(self._handover.engine, engine):
                return {}
            # Whatever comes of it: another one could read blocks that prefill has given away.
            self._lease_taken = True
        params = self._handover.decode_params(engine, first_token_sent=self._first_token_sent)
        return {} if params is None else {"kv_transfer_params": params}

    def _may_hand_over(self, prefill: Engine, decode: Engine) -> bool:
        """Tell whether blocks of an engine that does not verify are safe to be read."""
        age_s = self._state.now() - self._handed_over_at
        lease_s = prefill.capabilities.lease_s
        return (
            not self._lease_taken
            and (not lease_s or age_s < lease_s / 2)
            and self._state.pool.may_hand_over(prefill, decode)
        )

    def _must_resume(self) -> bool:
        return (self._decode_has_answered or self._handover is None) and self.transcript.has_tokens

    def _can_go_on(self) -> bool:
        return self.transcript.can_resume or not self._must_resume()

    def _routing_request(self, hop: Hop) -> RoutingRequest:
        """Say where the prompt stands."""
        if self._must_resume():
            needs = _RESUMES
        else:
            needs = _TAKES_FIRST_TOKEN if self._first_token_sent else NO_NEEDS
        prompt = self._prompt
        return RoutingRequest(
            hop=hop,
            num_prompt_tokens=prompt.num_prompt_tokens,
            max_tokens=prompt.max_tokens,
            num_choices=prompt.num_choices,
            expected_tokens=self._state.pool.expected_tokens,
            prefix=self._prefix,
            wants_pair=prompt.wants_pair,
            is_suspect=self._state.suspects.is_suspect(prompt.origin),
            tried=frozenset(self._attempts.tried),
            needs=needs,
            prefill=""
            if self._handover is None or self._lease_taken
            else self._handover.engine.name,
            alone=prompt.alone,
        )

    def _refuse_too_long(self, num_prompt_tokens: int) -> None:
        """Raise RequestError for a request that decode would refuse in the middle of its answer.

        Prefill saw ``max_tokens=1``, not the client's own.
        """
        limit, max_tokens = self._state.pool.max_model_len("decode"), self._prompt.max_tokens
        if limit is None or max_tokens is None or num_prompt_tokens + max_tokens <= limit:
            return
        raise RequestError(
            f"the prompt's {num_prompt_tokens} tokens and max_tokens={max_tokens} exceed this "
            f"model's maximum context length of {limit} tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )

    def _release_untaken_lease(self) -> None:
        handover = self._handover
        if handover is None or handover.lease_id is None or self._lease_taken:
            return
        if handover.engine.capabilities.needs_proof:
            self._release_through_decode(handover)
        else:
            self._release(handover.engine, handover.lease_id)

    def _release_through_decode(self, handover: Handover) -> None:
        """Have a decode engine tell prefill that nobody pulls: it listens to nobody else."""
        decode = self._state.pool.route(self._routing_request("decode")).decode
        if decode is None or not self._may_hand_over(handover.engine, decode):
            return
        params = handover.decode_params(decode, first_token_sent=False)
        if params is not None:
            self._state.metrics.released()
            self._state.spawn(self._state.client.refuse_lease(decode, params))

    def _release(self, engine: Engine, name: HopId | LeaseId) -> None:
        if covers(engine.capabilities, _TAKES_FIRST_TOKEN):
            self._state.metrics.released()
            self._state.spawn(self._state.client.release(engine, name))

    def _headers(self, attempt: int) -> dict[str, str]:
        """Name each attempt differently: an engine may still hold blocks for the one before."""
        hop_id = self._prompt.hop_id if attempt == 0 else f"{self._prompt.hop_id}-r{attempt}"
        return (
            self._prompt.headers
            | self._state.suspects.header(self._prompt.origin)
            | {REQUEST_ID_HEADER: hop_id}
        )


def _refuse_broken(engine: Engine, chunk: Chunk) -> None:
    if any(choice.get("finish_reason") in _BROKEN for choice in chunk["choices"]):
        raise EngineFailure(engine, "gave the request up")
