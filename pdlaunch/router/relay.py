"""Relays one prompt: choose engines, prefill, hand over, decode; again if an engine fails.

::

    prefill(max_tokens=1) ── first tokens ──> client
         └ kv_transfer_params ──> decode ── chunks ──> client
                                     └ died: another engine resumes after the tokens so far

All chunks go through the transcript, so the client gets nothing twice, even from different engines.
Migration is the loop in ``run``.
"""

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from pdlaunch.errors import OverloadedError
from pdlaunch.http.errors import unavailable
from pdlaunch.http.headers import DATA_PARALLEL_HEADER, REQUEST_ID_HEADER
from pdlaunch.observe.spans import PULL
from pdlaunch.router.answers import ClientAnswer
from pdlaunch.router.client_request import COMPLETIONS, PromptRequest
from pdlaunch.router.clients import Client
from pdlaunch.router.continuation import (
    Continuation,
    Transcript,
    begin_continuation,
    continue_first_token,
    obstacle,
    request_obstacle,
)
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import (
    Chunk,
    EngineFailure,
    EngineRefusal,
    EngineStream,
    blames,
    refuse_broken,
)
from pdlaunch.router.handover import Handover
from pdlaunch.router.kv_index import PromptTokens
from pdlaunch.router.policy import Hop, Route, RoutingRequest
from pdlaunch.router.recovery import Attempts
from pdlaunch.router.request_history import EngineCall
from pdlaunch.router.state import RouterState

logger = logging.getLogger(__name__)

Begin = Callable[[], None]  # tells that the first token is computed
DEATH_LISTED_S = 5.0  # how long to wait until the registry shows a reported death


class Relay:
    """Answers one prompt. Call ``run`` once."""

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
        # Set if the client has the token of prefill (vLLM): decode continues after this token.
        self._after_first_token: Continuation | None = None
        self._decode_has_answered = False
        # The engine that has sent a second token. Its plain chunks take the fast path.
        self._continues_at: Engine | None = None
        self._attempts = Attempts(state.recovery)
        self._num_decode_attempts = 0
        # The engine from which decode pulls the prompt, until decode has answered.
        self._pulls_from: Engine | None = None

    async def run(self, client: Client) -> Transcript:
        """Return the whole answer. Raises RequestError, EngineRefusal or EngineFailure."""
        try:
            with self._state.suspects.watch(self._prompt.origin):
                await self._try_routes(client)
            return self.transcript
        finally:
            if self._lease is not None:
                self._lease.end(self._attempts.tried)
            # The failure's traceback refers to this object: a cycle would keep the body in memory.
            self._attempts.failure = None
            self._state.turns.queue.answered(client.flow, self.transcript.num_tokens)

    async def _try_routes(self, client: Client) -> None:
        self._prompt, self._tokens = await self._state.reader.read(self._prompt)
        if self._state.turns.is_fair:
            log, request = self._record.log, self._routing_request()
            start_at = log.clock()
            await self._state.turns.wait(client.flow, request, self._prompt.priority)
            client.waited(log.clock() - start_at)
            log.add("wait for turn", start_at)
        while not self.transcript.is_done:
            prefill, decode = await self._choose()
            hop: Hop = "prefill" if prefill else "decode"
            try:
                if prefill is not None:
                    await self._prefill(prefill, decode)
                    hop = "decode"
                    if not self._state.pool.lists(decode):
                        continue
                if not self.transcript.is_done:
                    await self._decode(decode)
            except (EngineFailure, EngineRefusal) as failure:
                # A failure after the end of the answer does not matter.
                if not self.transcript.is_done and not await self._can_continue(hop, failure):
                    raise

    @property
    def _must_resume(self) -> bool:
        """Return whether the next engine has to continue after the client's tokens."""
        # Until decode has answered, the lease hands over the first token with the blocks.
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
            or self._attempts.are_over("prefill"),
            holder=None if lease is None or lease.is_taken else lease.engine,
            tried=frozenset(self._attempts.tried),
            must_continue=self._must_resume,
            alone=prompt.alone,
        )

    async def _choose(self) -> tuple[Engine | None, Engine]:
        """Return the next engines for prefill, if any, and decode, once they can be asked."""
        state, attempts = self._state, self._attempts
        while True:
            request = self._routing_request()
            route = state.pool.route(request)
            self._record.routed("decode" if request.is_begun else "prefill", route)
            if route.decode is not None:
                self._follow(route)
                return route.prefill, route.decode
            # No work is lost yet: the client can retry here or at another deployment.
            if attempts.failure is None and self._lease is None:
                raise unavailable("no engine is ready", "no_engine_ready")
            wait_s = attempts.wait_s(state.now(), has_tokens=self.transcript.has_tokens)
            await state.registry_change(wait_s)
            attempts.waited(state.now())

    def _follow(self, route: Route) -> None:
        metrics, lease = self._state.metrics, self._lease
        hop: Hop = "decode" if route.prefill is None else "prefill"
        if self._num_decode_attempts or (hop == "prefill" and self._attempts.failure is not None):
            metrics.count("retries", hop)
            self._record.known.retries += 1
        if lease is None and not self._num_decode_attempts:
            metrics.routed(route)
            is_fallback = route.is_fallback or self._attempts.num_failures["prefill"] > 0
            if route.prefill is None and is_fallback:
                metrics.count("fallbacks")
        if lease is not None and lease.engine is not route.decode:
            route = msgspec.structs.replace(route, prefill=lease.engine)
        self._answer.routes[self._prompt.index] = route

    async def _prefill(self, engine: Engine, decode: Engine) -> None:
        """Let ``engine`` compute the first token of each choice and lease the prompt's blocks."""
        prompt, state, is_vllm = self._prompt, self._state, decode.capabilities.is_vllm
        # vLLM can continue only a stream after prefill's token; a whole answer would gain nothing.
        sends_first = not is_vllm or (
            prompt.is_stream and not request_obstacle(prompt, decode.capabilities)
        )
        body = prompt.prefill_body(
            knows_whole_request=not engine.capabilities.is_vllm, sends_first_token=sends_first
        )
        num_cached, dp_rank = state.pool.index.find(engine, self._tokens)
        # Unless the engine failed or refused, it may hold a lease, which must be released.
        may_be_leased = True
        try:
            with (
                decode.holding(prompt.num_choices * prompt.num_prompt_tokens),
                engine.working(
                    state.pool.clock,
                    num_prompt_tokens=prompt.num_prompt_tokens,
                    num_uncached=max(1, prompt.num_prompt_tokens - num_cached),
                    dp_rank=dp_rank,
                    moved=state.turns.take,
                ) as begin,
                self._record.call("prefill", engine.name) as call,
            ):
                try:
                    answer, ignored = await state.client.ask(
                        engine, prompt.endpoint.path, body, self._headers(0, dp_rank)
                    )
                except (EngineFailure, EngineRefusal):
                    may_be_leased = False
                    raise
                begin()
                self._answer.ignored_fields |= dict.fromkeys(ignored)
                with blames(engine):
                    is_chat = prompt.endpoint.is_chat
                    handover = Handover(state, engine, answer, is_chat=is_chat)
                call.add_report(handover.report, self._record.log.clock())
                call.counts(handover.usage)
        except BaseException:
            if may_be_leased:
                state.release(engine, prompt.hop_id)
            raise
        engine.health.succeeded(state.pool.clock())
        await self._take(handover, decode, sends_first)

    async def _take(self, handover: Handover, decode: Engine, sends_first: bool) -> None:
        """Keep the lease, and send the client prefill's tokens unless decode will send them."""
        self._lease = handover
        self._attempts.prefilled()
        sends_first = sends_first and handover.has_first_tokens
        if handover.engine.capabilities.is_vllm:
            self.transcript.note_usage(handover.usage)
            if sends_first:
                with blames(handover.engine), contextlib.suppress(LookupError):
                    self._after_first_token = continue_first_token(
                        self._prompt, handover.chunks[-1], decode.max_model_len
                    )
            sends_first = self._after_first_token is not None
        if not handover.is_final:
            # Check this before anything is sent: afterwards the status cannot change.
            self._prompt.check_length(
                handover.num_prompt_tokens, self._state.pool.max_model_len("decode")
            )
        if handover.is_final or sends_first:
            for chunk in handover.chunks:
                await self._send(handover.engine, chunk)

    async def _decode(self, engine: Engine) -> None:
        """Stream from an engine, which pulls the blocks, continues a stream, or does all work."""
        attempt, prompt, state = self._num_decode_attempts, self._prompt, self._state
        self._num_decode_attempts += 1
        is_vllm, continuation = engine.capabilities.is_vllm, self._after_first_token
        extra, lease = dict[str, Any](), None
        if self._must_resume:
            state.metrics.count("migrations")
            logger.info("continues at %s after %d tokens", engine.name, self.transcript.num_tokens)
            continuation = await self._continuation(engine) if is_vllm else None
            extra = {} if is_vllm else {"resume": self.transcript.resume_field()}
        elif self._lease is not None and (params := self._lease.decode_params(engine)) is not None:
            extra = {"kv_transfer_params": params}
            lease = self._lease if params.get("do_remote_prefill") else None
        if lease is not None:
            self._pulls_from = lease.engine
            self._record.known.kv_path = state.pool.path(lease.engine, engine)
        # Ask vLLM for a whole answer if the client wants one: its streams lack some fields.
        is_whole = is_vllm and not prompt.is_stream
        path = prompt.endpoint.path
        if continuation is None:
            body = prompt.decode_body(extra, is_whole=is_whole)
        else:
            body, path = continuation.body(extra), COMPLETIONS.path
        num_cached, dp_rank = state.pool.index.find(engine, self._tokens)
        with (
            engine.working(
                state.pool.clock,
                num_prompt_tokens=prompt.num_prompt_tokens,
                num_uncached=0 if extra else max(1, prompt.num_prompt_tokens - num_cached),
                num_streams=prompt.num_choices,
                dp_rank=dp_rank,
                reports_begin=not is_whole,
                moved=state.turns.take,
            ) as begin,
            self._record.call("decode", engine.name) as call,
        ):
            async with state.client.stream(
                engine, path, body, self._headers(attempt, dp_rank), is_whole=is_whole
            ) as stream:
                self._answer.ignored_fields |= dict.fromkeys(stream.ignored_fields)
                # The time of a whole answer does not show how fast the engine computes prompts.
                begin_at_token = None if is_whole else begin
                await self._relay(engine, stream, lease, call, begin_at_token, continuation)
        engine.health.succeeded(state.pool.clock())

    async def _continuation(self, engine: Engine) -> Continuation:
        """Return the request with which vLLM continues: prompt and output so far as its prompt."""
        prompt, client, limit = self._prompt, self._state.client, engine.max_model_len
        detokenize = partial(client.detokenize, engine, prompt.body.get("model"), prompt.headers)
        try:
            return await begin_continuation(prompt, self.transcript, detokenize, limit)
        except LookupError as error:
            raise self._lost(engine, str(error.args[0])) from error

    async def _relay(
        self,
        engine: Engine,
        stream: EngineStream,
        lease: Handover | None,
        call: EngineCall,
        begin: Begin | None,
        continuation: Continuation | None,
    ) -> None:
        """Send the client all new output of the engine, which pulls the blocks of ``lease``."""
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
            await self._send(engine, chunk, stream.has_more, begin)
        call.add_report(stream.report, self._record.log.clock())
        if lease is not None:
            has_failed = call.attributes(PULL).get("error") is not None
            engine.health.pulled(lease.engine.key, self._state.pool.clock(), ok=not has_failed)
        if not self.transcript.is_done:
            raise EngineFailure(engine, "its stream ended too early")

    async def _send(
        self, engine: Engine, chunk: Chunk, more_follows: bool = False, begin: Begin | None = None
    ) -> None:
        if self._continues_at is engine and (num_tokens := self.transcript.extend(chunk)):
            await self._answer.tokens(chunk, num_tokens, more_follows)
            return
        with blames(engine):
            refuse_broken(engine, chunk)
            has_output = self.transcript.admit(chunk)
        if has_output:
            # vLLM does not say which request has killed an engine.
            is_suspect = self._state.suspects.is_suspect(self._prompt.origin)
            self._attempts.progressed(may_kill=is_suspect or engine.capabilities.is_vllm)
        if self.transcript.has_tokens:
            if engine.health.is_tripped:
                engine.health.answers(self._state.pool.clock())
            if begin is not None:
                begin()
        if has_output:
            await self._answer.chunk(self._prompt, self.transcript, chunk, more_follows)
        elif not more_follows:
            await self._answer.flush()
        if self.transcript.num_tokens > 1 and self._prompt.index == 0 and self._answer.takes_tokens:
            self._continues_at = engine

    async def _can_continue(self, hop: Hop, failure: EngineFailure | EngineRefusal) -> bool:
        """Record a failure; return whether another attempt can help. Else the caller raises it."""
        # Raised here, its traceback and this frame would refer to each other: a cycle that would
        # keep the body in memory.
        state, engine = self._state, failure.engine
        pulls_from, self._pulls_from = self._pulls_from, None
        self._continues_at = None
        if isinstance(failure, EngineFailure):
            logger.warning("%s hop failed: %s", hop, str(failure))
            if pulls_from is not None and failure.is_reported:
                # The decode engine could still report the failure, so the pair is at fault.
                engine.health.pulled(pulls_from.key, state.pool.clock(), ok=False)
            else:
                engine.health.failed(state.pool.clock())
            state.metrics.count("engine_failures", engine.name, hop)
        elif not failure.is_busy:
            return False
        self._attempts.add(hop, failure, state.now())
        if isinstance(failure, EngineFailure) and failure.lost_rank:
            # The suspects of this death are known once the registry shows it.
            await state.find(lambda: not state.pool.lists(engine), DEATH_LISTED_S)
        state.suspects.check(self._prompt.origin)
        if hop == "prefill":
            # With a lease, decode would continue after first tokens that the client may not have.
            return self._lease is None
        if self._must_resume and engine.capabilities.is_vllm:
            reason = obstacle(self._prompt, self.transcript, engine.capabilities)
            if reason:
                raise self._lost(engine, reason)
        can_continue = not (self._must_resume and self.transcript.has_untold_tokens)
        return can_continue and not self._attempts.are_over("decode")

    def _lost(self, engine: Engine, reason: str) -> OverloadedError:
        self._state.metrics.count("lost_streams", reason)
        message = (
            f"engine {engine.name} was lost in the middle of this answer, and no other engine can "
            f"continue it ({reason}); send the request again"
        )
        return unavailable(message, "stream_lost")

    def _headers(self, attempt: int, dp_rank: int | None) -> dict[str, str]:
        prompt = self._prompt
        # Each attempt has its own id: an engine may still hold blocks for the previous attempt.
        hop_id = f"{prompt.hop_id}-r{attempt}" if attempt else prompt.hop_id
        return (
            prompt.headers
            | self._state.suspects.header(prompt.origin)
            | {REQUEST_ID_HEADER: hop_id}
            | ({} if dp_rank is None else {DATA_PARALLEL_HEADER: str(dp_rank)})
        )
