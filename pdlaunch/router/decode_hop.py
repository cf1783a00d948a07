"""Streams a prompt's answer from one engine after another, until it is whole.

An engine is handed prefill's KV blocks, or resumes after the tokens so far, or computes all.
"""

from __future__ import annotations

import logging
from collections.abc import Coroutine
from functools import partial
from typing import Any

import msgspec

from pdlaunch.observe.spans import PULL
from pdlaunch.router.client_request import COMPLETIONS
from pdlaunch.router.continuation import StreamLostError, begin_continuation, obstacle
from pdlaunch.router.early_decode import EarlyDecode
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_errors import EngineFailure, EngineRefusal, malformed_is_failure
from pdlaunch.router.engine_stream import EngineStream
from pdlaunch.router.handover import whole_chunk
from pdlaunch.router.leg import Leg
from pdlaunch.router.policy import Route
from pdlaunch.router.prompt_progress import PromptProgress, refuse_broken

logger = logging.getLogger(__name__)


class DecodeHop:
    """Takes a prompt to the end of its answer; ``run`` once."""

    def __init__(self, progress: PromptProgress) -> None:
        self._progress = progress
        self._prompt = progress.prompt
        self._state = progress.state
        self._record = progress.record
        self._transcript = progress.transcript
        self._num_attempts = 0
        self._pulls_from: Engine | None = None
        """The engine from which the next one pulls the prompt, until that has said something."""

    async def run(self) -> None:
        """Have the answer ended by the engine that was told early, or by those asked after it."""
        if self._progress.early is not None:
            await self._use_early(self._progress.early)
        while not self._transcript.is_done:
            await self._use_next()

    async def _use_early(self, early: EarlyDecode) -> None:
        """Stream from the engine that knows the prompt already, unless it has nothing to say."""
        progress = self._progress
        try:
            stream = await early.stream()
        except (EngineFailure, EngineRefusal) as failure:
            logger.info("told of the prompt in vain: %s", str(failure))
            progress.drop_early()
            await progress.hear_cause(early.engine, failure)
            return
        self._num_attempts += 1
        self._pulls_from = progress.lease.holder
        self._record.kv_path = progress.lease.path(early.engine)
        try:
            await self._attempt(
                early.engine, self._relay(early.engine, stream, early.leg, pulls=True)
            )
        finally:
            progress.drop_early("used")

    async def _use_next(self) -> None:
        """Stream from one engine, for as long as it lives; what failed is noted for the next."""
        progress = self._progress
        planned = progress.take_planned()
        engine = planned or await progress.attempts.next_engine(
            lambda: progress.routing_request("decode"),
            on_route=partial(progress.routed, "decode"),
            has_begun=self._transcript.has_tokens,
            may_wait=progress.lease.handover is not None,
        )
        if planned is None:
            holder = progress.lease.holder
            progress.sink.routed(
                self._prompt,
                Route(
                    reason="least work",
                    prefill=None if holder is engine else holder,
                    decode=engine,
                    left_out=progress.left_out,
                ),
            )
        attempt = self._num_attempts
        self._num_attempts += 1
        if attempt:
            self._state.metrics.retried("decode")
            self._record.retries += 1
        await self._attempt(engine, self._stream_from(engine, attempt))

    async def _attempt(self, engine: Engine, work: Coroutine[Any, Any, None]) -> None:
        """Await ``work``. Raises its failure when no other attempt can make up for it."""
        progress = self._progress
        try:
            await work
        except (EngineFailure, EngineRefusal) as failure:
            progress.first_token.computes_no_more()
            # What breaks behind the end of the answer is nobody's loss.
            if self._transcript.is_done:
                return
            pulls_from, self._pulls_from = self._pulls_from, None
            if progress.attempts.is_final(engine, "decode", failure, pulls_from=pulls_from):
                raise
            await progress.hear_cause(engine, failure)
            self._refuse_lost(engine)
            can_go_on = self._transcript.can_resume or not progress.must_resume
            if progress.attempts.exhausts_decode(engine, failure) or not can_go_on:
                raise

    async def _stream_from(self, engine: Engine, attempt: int) -> None:
        progress, prompt = self._progress, self._prompt
        if progress.must_resume:
            self._state.metrics.migrated()
            logger.info("goes on at %s after %d tokens", engine.name, self._transcript.num_tokens)
            if not engine.capabilities.resumes:
                await self._continue_at(engine, attempt)
                return
        extra = self._extra(engine)
        pulls = bool(extra.get("kv_transfer_params", {}).get("do_remote_prefill"))
        if pulls:
            self._pulls_from = progress.lease.holder
            self._record.kv_path = progress.lease.path(engine)
        if engine.capabilities.has_own_fields and not prompt.is_stream:
            await self._ask_whole(engine, prompt.whole_body(extra), attempt, pulls=pulls)
            return
        body = prompt.decode_body(extra)
        if not extra:
            request = progress.routing_request("decode")
            progress.first_token.computes(engine, request)
            progress.first_token.expects(engine, request)
        with (
            engine.working(
                num_prompt_tokens=prompt.num_prompt_tokens, num_streams=prompt.num_choices
            ),
            self._record.leg(
                "decode", engine.name, progress.ask_spans(engine, progress.hop_id(attempt))
            ) as leg,
        ):
            async with self._state.client.stream(
                engine, prompt.endpoint.path, body, progress.headers(attempt)
            ) as stream:
                progress.sink.ignores(stream.ignored_fields)
                await self._relay(engine, stream, leg, pulls=pulls)

    def _extra(self, engine: Engine) -> dict[str, Any]:
        """Return what the next decode engine is given besides the client's body."""
        progress = self._progress
        if progress.must_resume:
            return {"resume": self._transcript.resume_field()}
        params = progress.lease.decode_params(engine, first_token_sent=progress.first_token_sent)
        return {} if params is None else {"kv_transfer_params": params}

    async def _relay(self, engine: Engine, stream: EngineStream, leg: Leg, *, pulls: bool) -> None:
        """Tell the client all that the engine says.

        ``pulls``: the stream starts only after its pull has ended, so its lease is used up.
        """
        progress, holder = self._progress, self._progress.lease.holder if pulls else None
        first_s, num_before = None, self._transcript.num_tokens
        while (chunk := await stream.next_chunk()) is not None:
            if first_s is None:
                first_s = stream.waited_s
                progress.decode_has_answered, self._pulls_from = True, None
                if pulls:
                    progress.lease.pulled()
            if usage := chunk.get("usage"):
                leg.counts(usage)
                if pulls:
                    progress.lease.check_pulled(engine, chunk)
            await progress.tell(engine, chunk, more_follows=stream.has_more)
        leg.hear(stream.report)
        if holder is not None:
            has_failed = leg.attributes(PULL).get("error") is not None
            self._state.pool.pulled(holder, engine, ok=not has_failed)
        if not self._transcript.is_done:
            raise EngineFailure(engine, "its stream ended too early")
        num_gaps = self._transcript.num_tokens - num_before - 1
        engine.told(num_gaps, stream.waited_s - (first_s or 0.0), self._state.pool.clock())
        self._state.pool.succeeded(engine)
        self._state.pool.served(
            engine, progress.routing_request("decode"), self._transcript.num_tokens
        )

    async def _ask_whole(self, engine: Engine, body: bytes, attempt: int, *, pulls: bool) -> None:
        """Have the engine make the answer whole: some of it is not told in streams."""
        progress, prompt = self._progress, self._prompt
        with (
            engine.working(
                num_prompt_tokens=prompt.num_prompt_tokens, num_streams=prompt.num_choices
            ),
            self._record.leg(
                "decode", engine.name, progress.ask_spans(engine, progress.hop_id(attempt))
            ) as leg,
        ):
            asked_at = self._state.pool.clock()
            answer = await self._state.client.ask(
                engine, prompt.endpoint.path, body, progress.headers(attempt)
            )
        took_s = self._state.pool.clock() - asked_at
        progress.sink.ignores(answer.ignored_fields)
        with malformed_is_failure(engine):
            chunk = whole_chunk(msgspec.json.decode(answer.body))
        leg.counts(chunk.get("usage"))
        if pulls:
            progress.lease.pulled()
            progress.lease.check_pulled(engine, chunk)
        await progress.tell(engine, chunk)
        if pulls:
            # Choices are computed side by side. Without a pull the prompt would count, too.
            num_tokens = self._transcript.usage().completion_tokens // prompt.num_choices
            engine.told_whole(num_tokens, took_s, self._state.pool.clock())
        self._state.pool.succeeded(engine)

    async def _continue_at(self, engine: Engine, attempt: int) -> None:
        """Have the engine go on behind the tokens so far, which it gets as a prompt."""
        progress, prompt, client = self._progress, self._prompt, self._state.client

        async def detokenize(token_ids: list[int]) -> str:
            body = msgspec.json.encode({"model": prompt.body.get("model"), "tokens": token_ids})
            answer = await client.ask(engine, "/detokenize", body, prompt.headers)
            return str(msgspec.json.decode(answer.body)["prompt"])

        try:
            continuation = await begin_continuation(prompt, self._transcript, detokenize)
            body = continuation.body(engine.max_model_len)
        except LookupError as error:
            raise self._lost(engine, str(error.args[0])) from error
        with (
            engine.working(num_prompt_tokens=prompt.num_prompt_tokens, num_streams=1),
            self._record.leg("decode", engine.name),
        ):
            async with client.stream(
                engine, COMPLETIONS.path, body, progress.headers(attempt)
            ) as stream:
                # A stop string across the seam ends it before the engine does.
                while (
                    not self._transcript.is_done
                    and (chunk := await stream.next_chunk()) is not None
                ):
                    with malformed_is_failure(engine):
                        refuse_broken(engine, chunk)
                        continued = continuation.take(chunk)
                    await progress.tell(engine, continued)
                if not self._transcript.is_done:
                    raise EngineFailure(engine, "its stream ended too early")
        self._state.pool.succeeded(engine)

    def _refuse_lost(self, engine: Engine) -> None:
        """Raise StreamLostError for a stream that engines like this one cannot go on with."""
        if self._progress.must_resume and engine.capabilities.has_own_fields:
            reason = obstacle(self._prompt, self._transcript, engine.capabilities)
            if reason:
                raise self._lost(engine, reason)

    def _lost(self, engine: Engine, reason: str) -> StreamLostError:
        self._state.metrics.lost_stream(reason)
        return StreamLostError(engine.name, reason)
