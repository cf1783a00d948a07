"""Takes one prompt through the engines: choose, prefill, hand over, decode; again where one fails.

::

    prefill(max_tokens=1) ── first tokens ──> client
         └ kv_transfer_params ──> decode ── chunks ──> client
                                     └ died: another engine resumes after the tokens so far

Everything that the client gets goes through the transcript, so it gets nothing twice, whichever
engine sends it. Migration is the loop in ``run``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import msgspec

from pdlaunch.http.headers import REQUEST_ID_HEADER
from pdlaunch.observe.spans import PULL
from pdlaunch.router.answers import ClientAnswer
from pdlaunch.router.client_request import COMPLETIONS, PromptRequest
from pdlaunch.router.clients import Client
from pdlaunch.router.continuation import Continuation, StreamLostError, begin_continuation, obstacle
from pdlaunch.router.engine import Engine, EngineKey
from pdlaunch.router.engine_client import (
    Chunk,
    EngineFailure,
    EngineRefusal,
    EngineStream,
    WholeAnswer,
    blames,
    refuse_broken,
)
from pdlaunch.router.handover import Handover
from pdlaunch.router.kv_index import PromptTokens
from pdlaunch.router.policy import Hop, Route, RoutingRequest, no_engine_ready
from pdlaunch.router.request_history import EngineCall
from pdlaunch.router.state import RouterState
from pdlaunch.router.transcript import Transcript

logger = logging.getLogger(__name__)


async def answer_prompt(
    prompt: PromptRequest, state: RouterState, answer: ClientAnswer, client: Client
) -> Transcript:
    """Answer one prompt. Raises RequestError, EngineRefusal or EngineFailure.

    Cancelling it ends the work of both engines.
    """
    relay = Relay(prompt, state, answer)
    with state.suspects.watch(prompt.origin):
        try:
            await relay.run(client)
        finally:
            relay.end()
            state.turns.queue.answered(client.flow, relay.transcript.num_tokens)
    return relay.transcript


class Relay:
    """Answers one prompt; ``run`` once, then ``end``."""

    def __init__(self, prompt: PromptRequest, state: RouterState, answer: ClientAnswer) -> None:
        self.transcript = Transcript(
            prompt.num_choices, keeps_text=prompt.is_stream and state.pool.is_vllm
        )
        answer.record.transcripts.append(self.transcript)
        self._prompt = prompt
        self._state = state
        self._answer = answer
        self._record = answer.record
        self._tokens: PromptTokens | None = None
        self._lease: Handover | None = None  # the handover of the prefill engine
        self._decode_has_answered = False
        # The engine that has sent a second token: its plain chunks take the fast path.
        self._goes_on_at: Engine | None = None
        self._tried: set[EngineKey] = set()
        self._turned_away_by: set[EngineKey] = set()
        self._failure: EngineFailure | EngineRefusal | None = None
        # When an engine first failed or had no room, since the last token.
        self._trouble_since_at: float | None = None
        self._retry_at = 0.0  # from when on engines that were tried may be asked again
        self._num_prefill_failures = 0
        self._num_decode_failures = 0
        self._num_decode_attempts = 0
        # The engine from which decode pulls the prompt, until decode has answered.
        self._pulls_from: Engine | None = None

    async def run(self, client: Client) -> None:
        """Answer the prompt, at one route after another until the answer is whole."""
        self._prompt, self._tokens = await self._state.reader.read(self._prompt)
        if self._state.turns.is_fair:
            await self._wait(client)
        while not self.transcript.is_done:
            route = await self._choose()
            hop: Hop = "decode" if route.prefill is None else "prefill"
            try:
                if route.prefill is not None and route.decode is not None:
                    await self._take(await self._prefill(route.prefill, route.decode))
                    hop = "decode"
                    if not self._state.pool.lists(route.decode):
                        continue
                if route.decode is not None and not self.transcript.is_done:
                    await self._decode(route.decode)
            except (EngineFailure, EngineRefusal) as failure:
                # A failure after the end of the answer does not matter.
                if not self.transcript.is_done and not await self._can_go_on(hop, failure):
                    raise

    async def _wait(self, client: Client) -> None:
        """Wait for the turn of the client's API key."""
        log, request = self._record.log, self._routing_request()
        start_at = log.clock()
        await self._state.turns.wait(client.flow, request, self._prompt.priority)
        client.waited(log.clock() - start_at)
        log.add("wait for turn", start_at)

    def end(self) -> None:
        """Give back what the prompt still holds, however it has ended."""
        if self._lease is not None:
            self._lease.end(self._tried)
        # Its traceback leads back here: a cycle would keep the body in memory.
        self._failure = None

    @property
    def _must_resume(self) -> bool:
        """Return whether the next engine has to continue from the client's tokens.

        The first token is handed over with the blocks, until decode has added more.
        """
        return (self._decode_has_answered or self._lease is None) and self.transcript.has_tokens

    def _routing_request(self) -> RoutingRequest:
        prompt, lease = self._prompt, self._lease
        return RoutingRequest(
            num_prompt_tokens=prompt.num_prompt_tokens,
            max_tokens=prompt.max_tokens,
            tokens=self._tokens,
            session=prompt.session,
            wants_pair=prompt.wants_pair,
            is_suspect=self._state.suspects.is_suspect(prompt.origin),
            is_begun=lease is not None
            or self.transcript.has_tokens
            or self._num_decode_attempts > 0
            or self._num_prefill_failures >= self._state.recovery.max_attempts,
            holder=None if lease is None or lease.is_taken else lease.engine,
            tried=frozenset(self._tried),
            must_go_on=self._must_resume,
            alone=prompt.alone,
        )

    async def _choose(self) -> Route:
        """Return the next route; after a failure wait for an engine.

        Raises the last failure, or OverloadedError.
        """
        state = self._state
        # Counted from the first failure, so that the wait ends even if engines fail in turn.
        end_at = (self._trouble_since_at or state.now()) + state.recovery.wait_s
        while True:
            request = self._routing_request()
            route = state.pool.route(request)
            self._record.routed("decode" if request.is_begun else "prefill", route)
            if route.decode is not None:
                self._follow(route)
                return route
            left_s = end_at - state.now()
            # Nothing is lost yet: the client can ask another deployment, or again.
            if self._failure is None and self._lease is None:
                raise no_engine_ready("no engine is ready")
            if isinstance(self._failure, EngineRefusal):
                # All are busy: refuse a client without an answer, and let a stream wait.
                if left_s <= 0 or not self.transcript.has_tokens:
                    raise self._failure
                await state.registry_change(min(left_s, state.recovery.busy_wait_s))
                self._tried.clear()
            elif left_s <= 0 or (self._failure is not None and not self._failure.may_return):
                raise self._failure or no_engine_ready("no engine can go on with this request")
            else:
                # An engine that failed may still be in the registry.
                retry_in_s = max(0.0, self._retry_at - state.now()) if self._tried else left_s
                await state.registry_change(min(left_s, retry_in_s))
                if state.now() >= self._retry_at:
                    self._tried.clear()

    def _follow(self, route: Route) -> None:
        """Count the route, and tell the client about it."""
        metrics, lease = self._state.metrics, self._lease
        hop: Hop = "decode" if route.prefill is None else "prefill"
        if self._num_decode_attempts or (hop == "prefill" and self._failure is not None):
            metrics.count("retries", hop)
            self._record.retries += 1
        if lease is None and not self._num_decode_attempts:
            metrics.routed(route)
            is_fallback = route.is_fallback or self._num_prefill_failures > 0
            if route.prefill is None and is_fallback:
                metrics.count("fallbacks")
        if lease is not None and lease.engine is not route.decode:
            route = msgspec.structs.replace(route, prefill=lease.engine)
        self._answer.routed(self._prompt, route)

    async def _prefill(self, engine: Engine, decode: Engine) -> Handover:
        """Have the first token of each choice drawn, and a lease on the blocks granted."""
        prompt, state = self._prompt, self._state
        body = prompt.prefill_body(knows_whole_request=not engine.capabilities.is_vllm)
        # Unless the engine refuses, there may be a lease, which would last until its deadline.
        may_be_leased = True
        try:
            with (
                decode.holding(prompt.num_choices * prompt.num_prompt_tokens),
                self._work(engine) as begin,
                self._record.call("prefill", engine.name) as call,
            ):
                try:
                    answer, ignored = await state.client.ask(
                        engine, prompt.endpoint.path, body, self._headers(0)
                    )
                except (EngineFailure, EngineRefusal):
                    may_be_leased = False
                    raise
                begin()
                self._answer.ignores(ignored)
                with blames(engine):
                    is_chat = prompt.endpoint.is_chat
                    handover = Handover(state, engine, answer, is_chat=is_chat)
                call.hear(handover.report, self._record.log.clock())
                call.counts(handover.usage)
        except BaseException:
            if may_be_leased:
                state.release(engine, prompt.hop_id)
            raise
        state.pool.served(engine)
        return handover

    async def _take(self, handover: Handover) -> None:
        """Send the client prefill's tokens, unless decode engines have to send them.

        Raises RequestError for a prompt that decode would refuse.
        """
        self._lease = handover
        self._tried.clear()
        self._failure = self._trouble_since_at = None
        if handover.engine.capabilities.is_vllm:
            self.transcript.note_usage(handover.usage)
        if not handover.is_final:
            # Before anything is sent: afterwards no status can be set.
            self._prompt.check_length(
                handover.num_prompt_tokens, self._state.pool.max_model_len("decode")
            )
        if handover.is_final or handover.has_first_tokens:
            for chunk in handover.chunks:
                await self._tell(handover.engine, chunk)

    async def _decode(self, engine: Engine) -> None:
        """Stream from one engine, which pulls the prompt, goes on after tokens, or does all."""
        attempt, prompt = self._num_decode_attempts, self._prompt
        self._num_decode_attempts += 1
        is_vllm, continuation = engine.capabilities.is_vllm, None
        if self._must_resume:
            self._state.metrics.count("migrations")
            logger.info("goes on at %s after %d tokens", engine.name, self.transcript.num_tokens)
            continuation = await self._continuation(engine) if is_vllm else None
        extra = {} if continuation else self._extra(engine)
        params = extra.get("kv_transfer_params", {})
        lease = self._lease if params.get("do_remote_prefill") else None
        if lease is not None:
            self._pulls_from = lease.engine
            self._record.kv_path = self._state.pool.path(lease.engine, engine)
        # Streams of vLLM lack some fields of whole answers.
        is_whole = is_vllm and not prompt.is_stream
        body = continuation.body if continuation else prompt.decode_body(extra, is_whole=is_whole)
        path = COMPLETIONS.path if continuation else prompt.endpoint.path
        computes = not extra and continuation is None
        with (
            self._work(
                engine, computes=computes, num_streams=prompt.num_choices, tells_begin=not is_whole
            ) as begin,
            self._record.call("decode", engine.name) as call,
        ):
            async with self._state.client.stream(
                engine, path, body, self._headers(attempt), is_whole=is_whole
            ) as stream:
                self._answer.ignores(stream.ignored_fields)
                # The time of a whole answer says nothing about the engine's speed with prompts.
                begin_at_token = None if is_whole else begin
                await self._relay(engine, stream, lease, call, begin_at_token, continuation)
        self._state.pool.served(engine)

    async def _continuation(self, engine: Engine) -> Continuation:
        """Have an engine of vLLM continue after the tokens so far, which it gets as a prompt."""
        prompt, client = self._prompt, self._state.client
        detokenize = partial(
            client.detokenize, engine, prompt.body.get("model"), headers=prompt.headers
        )
        try:
            return await begin_continuation(
                prompt, self.transcript, detokenize, engine.max_model_len
            )
        except LookupError as error:
            raise self._lost(engine, str(error.args[0])) from error

    def _extra(self, engine: Engine) -> dict[str, Any]:
        if self._must_resume:
            return {"resume": self.transcript.resume_field()}
        if self._lease is None:
            return {}
        params = self._lease.decode_params(engine)
        return {} if params is None else {"kv_transfer_params": params}

    async def _relay(
        self,
        engine: Engine,
        stream: EngineStream | WholeAnswer,
        lease: Handover | None,
        call: EngineCall,
        begin: Callable[[], None] | None,
        continuation: Continuation | None,
    ) -> None:
        """Send the client everything that the engine sends.

        ``lease``: the blocks to pull. A stream starts only after its pull has ended.
        """
        is_first = True
        while (chunk := await stream.next_chunk()) is not None:
            if is_first:
                is_first, self._decode_has_answered, self._pulls_from = False, True, None
                if lease is not None:
                    lease.pulled()
            if usage := chunk.get("usage"):
                call.counts(usage)
                if lease is not None:
                    lease.check_pulled(engine, chunk)
            if continuation is not None:
                with blames(engine):
                    refuse_broken(engine, chunk)
                    continuation.take(chunk)
            await self._tell(engine, chunk, more_follows=stream.has_more, begin=begin)
        call.hear(stream.report, self._record.log.clock())
        if lease is not None:
            has_failed = call.attributes(PULL).get("error") is not None
            self._state.pool.pulled(lease.engine, engine, ok=not has_failed)
        if not self.transcript.is_done:
            raise EngineFailure(engine, "its stream ended too early")

    async def _tell(
        self,
        engine: Engine,
        chunk: Chunk,
        *,
        more_follows: bool = False,
        begin: Callable[[], None] | None = None,
    ) -> None:
        """Send the client its new tokens. Raises EngineFailure when the engine gives up."""
        if self._goes_on_at is engine and (num_tokens := self.transcript.extend(chunk)):
            await self._answer.tokens(chunk, num_tokens, more_follows=more_follows)
            return
        with blames(engine):
            refuse_broken(engine, chunk)
            has_news = self.transcript.admit(chunk)
            self._trouble_since_at = None
        if self.transcript.has_tokens:
            if engine.health.is_tripped:
                engine.health.answers(self._state.pool.clock())
            if begin is not None:
                begin()
        if has_news:
            await self._answer.chunk(
                self._prompt, self.transcript, chunk, more_follows=more_follows
            )
        elif not more_follows:
            await self._answer.flush()
        if self.transcript.num_tokens > 1 and self._prompt.index == 0 and self._answer.takes_tokens:
            self._goes_on_at = engine

    async def _can_go_on(self, hop: Hop, failure: EngineFailure | EngineRefusal) -> bool:
        """Record a failure; return whether another attempt can help.

        The caller raises it: here its traceback would lead to a frame that holds it, and the cycle
        would keep the body in memory.
        """
        state, engine = self._state, failure.engine
        pulls_from, self._pulls_from = self._pulls_from, None
        self._num_prefill_failures += hop == "prefill"
        if isinstance(failure, EngineFailure):
            logger.warning("%s hop failed: %s", hop, str(failure))
            if pulls_from is not None and failure.is_told:
                # The decode engine could still report the failure, so the pair is at fault.
                state.pool.pulled(pulls_from, engine, ok=False)
            else:
                state.pool.failed(engine)
            state.metrics.count("engine_failures", engine.name, hop)
            self._retry_at = state.now() + state.recovery.retry_wait_s
            # An engine that turns the request away again has survived it: do not count that.
            is_free = failure.turned_away and engine.key in self._turned_away_by
            self._num_decode_failures += hop == "decode" and not is_free
            if failure.turned_away:
                self._turned_away_by.add(engine.key)
        elif not failure.is_busy:
            return False
        self._trouble_since_at = self._trouble_since_at or state.now()
        self._tried.add(engine.key)
        self._failure = failure
        if isinstance(failure, EngineFailure) and failure.lost_rank:
            # Before another engine gets the request that may have killed this one.
            await state.death_is_listed(engine)
        state.suspects.check(self._prompt.origin)
        if hop == "prefill":
            # Decode would go on behind first tokens that the client may not have.
            return self._lease is None
        if self._must_resume and engine.capabilities.is_vllm:
            reason = obstacle(self._prompt, self.transcript, engine.capabilities)
            if reason:
                raise self._lost(engine, reason)
        can_go_on = self.transcript.can_resume or not self._must_resume
        return can_go_on and self._num_decode_failures < state.recovery.max_attempts

    def _lost(self, engine: Engine, reason: str) -> StreamLostError:
        self._state.metrics.count("lost_streams", reason)
        return StreamLostError(engine.name, reason)

    def _headers(self, attempt: int) -> dict[str, str]:
        prompt = self._prompt
        # Each attempt has its own name: an engine may still hold blocks for the one before.
        hop_id = f"{prompt.hop_id}-r{attempt}" if attempt else prompt.hop_id
        return (
            prompt.headers
            | self._state.suspects.header(prompt.origin)
            | {REQUEST_ID_HEADER: hop_id}
        )

    def _work(
        self,
        engine: Engine,
        *,
        computes: bool = True,
        num_streams: int = 0,
        tells_begin: bool = True,
    ) -> AbstractContextManager[Callable[[], None]]:
        pool = self._state.pool
        return engine.working(
            pool.clock,
            num_prompt_tokens=self._prompt.num_prompt_tokens,
            num_uncached=pool.num_new_tokens(engine, self._routing_request()) if computes else 0,
            num_streams=num_streams,
            tells_begin=tells_begin,
            moved=self._state.turns.take,
        )
