"""One prompt through the engines: prefill, hand over, decode; another engine where one fails.

::

    prefill(max_tokens=1) ── first tokens ──> client
         └ kv_transfer_params ──> decode ── chunks ──> client
                                     └ died: another engine with `resume` = the tokens so far ──> client

A request that only one engine can or need serve goes there at once. Where both can, prefill's
answer is a stream, and decode has been told of the prompt meanwhile (``early_decode.py``). All that
is sent to the client went through the transcript, so that nothing is told twice whichever engine
says it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Coroutine, Iterator
from typing import Any, Protocol

import msgspec

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.errors import RANK_LOST, RETRY_AFTER_S
from pdlaunch.http.headers import REQUEST_ID_HEADER
from pdlaunch.protocol.ids import HopId, LeaseId
from pdlaunch.router.client_request import PromptRequest
from pdlaunch.router.early_decode import EarlyDecode, tell_decode
from pdlaunch.router.engine_client import Chunk, EngineFailure, EngineRefusal, EngineStream
from pdlaunch.router.handover import Handover, HandoverStream, read_handover
from pdlaunch.router.hops import Hops
from pdlaunch.router.metrics import EarlyOutcome, Hop
from pdlaunch.router.pool import Engine, EngineKey
from pdlaunch.router.transcript import Transcript

logger = logging.getLogger(__name__)

_MALFORMED = (msgspec.DecodeError, LookupError, TypeError, AttributeError, ValueError)
_BROKEN = frozenset({"error", "abort"})
"""Reasons with which an engine gives a request up that nobody has cancelled."""


class Sink(Protocol):
    """Where the chunks of all prompts of a request go."""

    async def chunk(self, prompt: PromptRequest, transcript: Transcript, chunk: Chunk) -> None:
        """One chunk that is new to the client."""


class Generation:
    """The life of one prompt; ``run`` once."""

    def __init__(self, prompt: PromptRequest, hops: Hops, sink: Sink) -> None:
        self.transcript = Transcript(prompt.num_choices)
        self._prompt = prompt
        self._hops = hops
        self._sink = sink
        self._handover: Handover | None = None
        self._early: EarlyDecode | None = None
        self._first_token_sent = False
        self._decode_has_answered = False
        self._lease_taken = False
        self._tried: set[EngineKey] = set()
        self._failure: EngineFailure | EngineRefusal | None = None
        self._retry_at_s = 0.0
        """When those who were tried may be asked again."""
        self._trouble_since_s: float | None = None
        """When the first engine failed since something was heard."""
        self._num_decode_attempts = 0
        self._num_decode_failures = 0
        self._turned_away_by: set[EngineKey] = set()

    async def run(self) -> None:
        """Answer the prompt. Raises RequestError, EngineRefusal or EngineFailure; cancelling ends
        both hops.
        """
        with self._hops.suspects.watch(self._prompt.origin):
            try:
                await self._prefill()
                if self._early is not None:
                    await self._decode_early(self._early)
                while not self.transcript.is_done:
                    await self._decode()
            finally:
                self._drop_early()
                self._release_untaken_lease()

    async def _prefill(self) -> None:
        """Hand the prompt to a prefill engine; where none can do it, the decode engine will do
        all.
        """
        pool = self._hops.pool
        if self._prompt.max_tokens == 1:
            return
        while pool.has_ready("decode") and len(self._tried) < self._hops.recovery.max_attempts:
            engine = pool.pick("prefill", strict=True, exclude=self._tried)
            if engine is None:
                break
            if self._failure is not None:
                self._hops.metrics.retried("prefill")
            try:
                handover = await self._ask_prefill(engine)
            except (EngineFailure, EngineRefusal) as failure:
                self._note(engine, "prefill", failure)
                await self._hear_cause(engine, failure)
                if self.transcript.has_tokens:
                    # The first token is told: decode goes on after it, from a prompt that it
                    # computes itself.
                    return
            else:
                await self._begin_answer(handover)
                return
        self._hops.metrics.fell_back()

    async def _ask_prefill(self, engine: Engine) -> Handover:
        early = self._early = (
            None
            if self._is_suspect
            else tell_decode(self._prompt, engine, self._hops.pool, self._hops.client)
        )
        try:
            with engine.working(prompt_tokens=self._prompt.prompt_tokens):
                work = (
                    self._await_prefill(engine)
                    if early is None
                    else self._stream_prefill(engine, early.lease_id)
                )
                handover = await work
        except BaseException as error:
            self._drop_early()
            if not isinstance(error, EngineFailure | EngineRefusal):
                # The answer may be on its way, and the lease that it speaks of would wait for its
                # deadline.
                self._release(engine, self._prompt.hop_id)
            raise
        self._hops.pool.succeeded(engine)
        return handover

    async def _stream_prefill(self, engine: Engine, lease_id: LeaseId) -> Handover:
        """The client is told the first token when it is there, and its lease may come later."""
        prompt, answer, prompt_token_ids = (
            self._prompt,
            HandoverStream(engine),
            self._prompt.wanted_token_ids,
        )
        body = prompt.prefill_body(knows_whole_request=True, lease_id=lease_id)
        async with self._hops.client.stream(
            engine, prompt.endpoint.path, body, self._headers(attempt=0)
        ) as stream:
            while (chunk := await stream.next_chunk()) is not None:
                with _malformed_is_failure(engine):
                    answer.take(chunk)
                    if prompt_token_ids is not None:
                        for choice in chunk["choices"]:
                            choice["prompt_token_ids"] = prompt_token_ids
                if not answer.is_final:
                    self._refuse_too_long(answer.num_prompt_tokens)
                await self._tell(engine, chunk)
        with _malformed_is_failure(engine):
            return answer.handover()

    async def _await_prefill(self, engine: Engine) -> Handover:
        prompt = self._prompt
        body = prompt.prefill_body(knows_whole_request=engine.capabilities.gives_first_token)
        raw = await self._hops.client.ask(
            engine, prompt.endpoint.path, body, self._headers(attempt=0)
        )
        with _malformed_is_failure(engine):
            handover = read_handover(engine, raw, is_chat=prompt.endpoint.is_chat)
        for chunk in handover.chunks:
            _refuse_broken(engine, chunk)
        return handover

    async def _begin_answer(self, handover: Handover) -> None:
        """Tell the client what prefill knows, if the decode engines need not tell it again."""
        self._handover = handover
        self._tried.clear()
        self._failure = self._trouble_since_s = None
        if not handover.is_final:
            self._refuse_too_long(handover.num_prompt_tokens)
        self._first_token_sent = (handover.is_final or self.transcript.has_tokens) or (
            handover.has_first_tokens
            and self._hops.pool.has_ready("decode", needs=_takes_first_token)
        )
        if self._first_token_sent:
            for chunk in handover.chunks:
                await self._tell(handover.engine, chunk)
        goes_on = self._first_token_sent and not handover.is_final
        if self._early is not None and not (goes_on and handover.lease_id == self._early.lease_id):
            self._drop_early()

    async def _decode_early(self, early: EarlyDecode) -> None:
        """Stream from the engine that knows the prompt already; one that has nothing to say leaves
        it to ``_decode``.
        """
        try:
            stream = await early.stream()
        except (EngineFailure, EngineRefusal) as failure:
            logger.info("told of the prompt in vain: %s", failure)
            self._drop_early()
            await self._hear_cause(early.engine, failure)
            return
        self._num_decode_attempts += 1
        try:
            await self._attempt(early.engine, self._relay(early.engine, stream, pulls=True))
        finally:
            self._drop_early("used")

    def _drop_early(self, outcome: EarlyOutcome = "dropped") -> None:
        early, self._early = self._early, None
        if early is not None:
            self._hops.metrics.told_early(outcome)
            self._hops.spawn(early.close())

    async def _decode(self) -> None:
        """Stream from one engine, for as long as it lives; what failed is noted for the next."""
        engine = await self._next_engine()
        attempt = self._num_decode_attempts
        self._num_decode_attempts += 1
        if attempt:
            self._hops.metrics.retried("decode")
        await self._attempt(engine, self._stream_from(engine, attempt))

    async def _attempt(self, engine: Engine, work: Coroutine[Any, Any, None]) -> None:
        """Raises the failure of ``work`` when no other attempt can make up for it."""
        try:
            await work
        except (EngineFailure, EngineRefusal) as failure:
            if self.transcript.is_done:
                return
            self._note(engine, "decode", failure)
            await self._hear_cause(engine, failure)
            self._num_decode_failures += isinstance(
                failure, EngineFailure
            ) and not self._is_still_away(engine, failure)
            if (
                self._num_decode_failures == self._hops.recovery.max_attempts
                or not self._can_go_on()
            ):
                raise

    async def _hear_cause(self, engine: Engine, failure: EngineFailure | EngineRefusal) -> None:
        """Know whether the engine died of this request before another one gets it. Raises
        KillsEngineError if so again.
        """
        if isinstance(failure, EngineFailure) and failure.engine_code == RANK_LOST:
            await self._hops.news_of_death(engine)
        self._hops.suspects.check(self._prompt.origin)

    @property
    def _is_suspect(self) -> bool:
        return bool(self._hops.suspects.header(self._prompt.origin))

    def _is_still_away(self, engine: Engine, failure: EngineFailure) -> bool:
        """An engine that turns a request away again has survived it."""
        before = engine.key in self._turned_away_by
        if failure.turned_away:
            self._turned_away_by.add(engine.key)
        return failure.turned_away and before

    async def _stream_from(self, engine: Engine, attempt: int) -> None:
        prompt, extra = self._prompt, self._decode_extra(engine)
        if "resume" in extra:
            self._hops.metrics.migrated()
            logger.info("goes on at %s after %d tokens", engine.name, self.transcript.num_tokens)
        pulls = bool(extra.get("kv_transfer_params", {}).get("do_remote_prefill"))
        body = prompt.decode_body(extra)
        with engine.working(prompt_tokens=prompt.prompt_tokens, num_streams=prompt.num_choices):
            async with self._hops.client.stream(
                engine, prompt.endpoint.path, body, self._headers(attempt)
            ) as stream:
                await self._relay(engine, stream, pulls=pulls)

    async def _relay(self, engine: Engine, stream: EngineStream, *, pulls: bool) -> None:
        """Tell the client all that the engine says. ``pulls``: it says nothing before the lease is
        of no more use.
        """
        while (chunk := await stream.next_chunk()) is not None:
            self._decode_has_answered = True
            self._lease_taken |= pulls
            await self._tell(engine, chunk)
        if not self.transcript.is_done:
            raise EngineFailure(engine, "its stream ended too early")
        self._hops.pool.succeeded(engine)

    async def _tell(self, engine: Engine, chunk: Chunk) -> None:
        try:
            _refuse_broken(engine, chunk)
            has_news = self.transcript.admit(chunk)
            self._trouble_since_s = None
        except _MALFORMED as error:
            raise EngineFailure(engine, f"malformed chunk: {error!r}", may_return=False) from error
        if has_news:
            await self._sink.chunk(self._prompt, self.transcript, chunk)

    def _decode_extra(self, engine: Engine) -> dict[str, Any]:
        """What the next decode engine is given besides the client's body."""
        if self._must_resume():
            return {"resume": self.transcript.resume_field()}
        if self._handover is None:
            return {}
        params = self._handover.decode_params(engine, first_token_sent=self._first_token_sent)
        return {} if params is None else {"kv_transfer_params": params}

    def _must_resume(self) -> bool:
        return (self._decode_has_answered or self._handover is None) and self.transcript.has_tokens

    def _can_go_on(self) -> bool:
        return self.transcript.can_resume or not self._must_resume()

    def _fits(self, engine: Engine) -> bool:
        """The engine can take the request where it stands."""
        if self._must_resume():
            return engine.capabilities.resumes
        return _takes_first_token(engine) or not self._first_token_sent

    async def _next_engine(self) -> Engine:
        """The engine for the next attempt; after a failure one is waited for. Raises what failed
        last, or OverloadedError.
        """
        hops = self._hops
        role: Hop = "prefill" if self._prompt.max_tokens == 1 else "decode"
        since_s = hops.now_s() if self._trouble_since_s is None else self._trouble_since_s
        deadline_s = since_s + hops.recovery.wait_s
        while True:
            engine = hops.pool.pick(role, exclude=self._tried, needs=self._fits)
            if engine is not None:
                return engine
            left_s = deadline_s - hops.now_s()
            if self._failure is None and self._handover is None:
                raise OverloadedError(
                    "no engine is ready",
                    status=503,
                    retry_after_s=RETRY_AFTER_S,
                    code="no_engine_ready",
                )
            if isinstance(self._failure, EngineRefusal):
                await self._wait_for_room(self._failure, left_s)
            elif left_s <= 0 or (self._failure is not None and not self._failure.may_return):
                raise self._failure or _nobody_left()
            else:
                await self._wait_for_return(left_s)

    async def _wait_for_return(self, left_s: float) -> None:
        """For news of the registry, or until who failed may be asked again: the registry need not
        know that it was away.
        """
        hops = self._hops
        retry_in_s = max(0.0, self._retry_at_s - hops.now_s()) if self._tried else left_s
        await hops.registry_change(min(left_s, retry_in_s))
        if hops.now_s() >= self._retry_at_s:
            self._tried.clear()

    async def _wait_for_room(self, busy: EngineRefusal, left_s: float) -> None:
        """All engines are busy: what a client without an answer is told; one whose answer has begun
        waits.
        """
        if left_s <= 0 or not self.transcript.has_tokens:
            raise busy
        await self._hops.registry_change(min(left_s, self._hops.recovery.busy_wait_s))
        self._tried.clear()

    def _note(self, engine: Engine, hop: Hop, failure: EngineFailure | EngineRefusal) -> None:
        """Remember what went wrong; raises a refusal that no other engine would take back."""
        if isinstance(failure, EngineRefusal) and not failure.is_busy:
            raise failure
        if isinstance(failure, EngineFailure):
            logger.warning("%s hop failed: %s", hop, failure)
            self._hops.pool.failed(engine)
            self._hops.metrics.engine_failed(engine.name, hop)
            now_s = self._hops.now_s()
            self._retry_at_s = now_s + self._hops.recovery.retry_wait_s
            self._trouble_since_s = (
                now_s if self._trouble_since_s is None else self._trouble_since_s
            )
        else:
            self._trouble_since_s = None
        self._tried.add(engine.key)
        self._failure = failure

    def _refuse_too_long(self, num_prompt_tokens: int) -> None:
        """Prefill saw ``max_tokens=1``; decode would refuse the client's own when its answer has
        begun.
        """
        limit, max_tokens = self._hops.pool.max_model_len("decode"), self._prompt.max_tokens
        if limit is None or max_tokens is None or num_prompt_tokens + max_tokens <= limit:
            return
        raise RequestError(
            f"the prompt's {num_prompt_tokens} tokens and max_tokens={max_tokens} exceed this "
            "model's maximum context "
            f"length of {limit} tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )

    def _release_untaken_lease(self) -> None:
        handover = self._handover
        if handover is None or handover.lease_id is None or self._lease_taken:
            return
        self._release(handover.engine, handover.lease_id)

    def _release(self, engine: Engine, name: HopId | LeaseId) -> None:
        if engine.capabilities.gives_first_token:
            self._hops.metrics.released()
            self._hops.spawn(self._hops.client.release(engine, name))

    def _headers(self, attempt: int) -> dict[str, str]:
        """Each attempt has an id of its own: an engine may still hold blocks for the one before."""
        hop_id = self._prompt.hop_id if attempt == 0 else f"{self._prompt.hop_id}-r{attempt}"
        return (
            self._prompt.headers
            | self._hops.suspects.header(self._prompt.origin)
            | {REQUEST_ID_HEADER: hop_id}
        )


@contextlib.contextmanager
def _malformed_is_failure(engine: Engine) -> Iterator[None]:
    try:
        yield
    except _MALFORMED as error:
        raise EngineFailure(engine, f"malformed answer: {error!r}", may_return=False) from error


def _takes_first_token(engine: Engine) -> bool:
    return engine.capabilities.gives_first_token


def _refuse_broken(engine: Engine, chunk: Chunk) -> None:
    if any(choice.get("finish_reason") in _BROKEN for choice in chunk["choices"]):
        raise EngineFailure(engine, "gave the request up")


def _nobody_left() -> OverloadedError:
    return OverloadedError(
        "no engine can go on with this request",
        status=503,
        retry_after_s=RETRY_AFTER_S,
        code="no_engine_ready",
    )
