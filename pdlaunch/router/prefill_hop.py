"""Asks prefill engines for the KV blocks and the first token of a prompt, until one has answered.

Where both engines can, prefill's answer is a stream, and decode has been told of the prompt
meanwhile (``early_decode.py``).
"""

from __future__ import annotations

import math

from pdlaunch.errors import OverloadedError, RequestError
from pdlaunch.http.errors import RETRY_AFTER_S, WITHDRAWN_CODE
from pdlaunch.protocol.ids import LeaseId
from pdlaunch.router.cost_model import Estimate
from pdlaunch.router.early_decode import EarlyDecode, early_hop_id
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_errors import EngineFailure, EngineRefusal, malformed_is_failure
from pdlaunch.router.handover import Handover, HandoverStream, read_handover
from pdlaunch.router.leg import Leg
from pdlaunch.router.pace import OVERHEAD_TOKENS
from pdlaunch.router.prompt_progress import TAKES_FIRST_TOKEN, PromptProgress, refuse_broken

MAX_RETRY_AFTER_S = 60
"""Clients that are refused are asked to try again by then: long estimates may well be wrong."""


class PrefillHop:
    """Takes a prompt to the hand-over; ``run`` once."""

    def __init__(self, progress: PromptProgress) -> None:
        self._progress = progress
        self._prompt = progress.prompt
        self._state = progress.state
        self._record = progress.record

    async def run(self) -> None:
        """Hand the prompt to a prefill engine; where none can do it, decode will do all."""
        progress, state = self._progress, self._state
        while progress.attempts.num_tried < state.recovery.max_attempts:
            route = state.pool.route(progress.routing_request("prefill"))
            progress.routed("prefill", route)
            if route.too_late is not None:
                self._refuse_too_late(route.too_late, progress.left_s or 0.0)
            if self._prompt.max_tokens == 1:
                return  # no hand-over: one engine does all
            if route.prefill is None and route.decode is None:
                break
            progress.follow(route)
            state.metrics.routed(route.kind)
            if route.prefill is None:
                return
            if progress.attempts.has_failed:
                state.metrics.retried("prefill")
                self._record.retries += 1
            try:
                handover = await self._ask(route.prefill, route.decode, route.planned)
            except (EngineFailure, EngineRefusal) as failure:
                if self._is_taken_over(failure):
                    return
                if progress.attempts.is_final(route.prefill, "prefill", failure):
                    raise
                await progress.hear_cause(route.prefill, failure)
                if progress.transcript.has_tokens:
                    # The first token is told: decode goes on after it, from a prompt that it
                    # computes itself.
                    return
            else:
                await self._begin_answer(handover)
                return
        if state.pool.has_pairs:
            state.metrics.fell_back()

    async def _ask(
        self, engine: Engine, told_early: Engine | None, planned: Engine | None
    ) -> Handover:
        progress, prompt = self._progress, self._prompt
        early = progress.early = (
            None
            if told_early is None or engine.lender is None
            else EarlyDecode(
                told_early,
                engine.lender,
                prompt,
                self._state.client,
                self._record.leg(
                    "decode",
                    told_early.name,
                    progress.ask_spans(told_early, early_hop_id(prompt)),
                    early=True,
                ),
            )
        )
        try:
            request, asked_at = progress.routing_request("prefill"), self._state.now()
            progress.first_token.computes(engine, request)
            if early is not None:
                progress.first_token.expects(early.engine, request)
            elif planned is not None:
                progress.first_token.expects(planned, request, is_counted=False)
            with (
                progress.first_token.waits(engine, prompt.hop_id, request),
                engine.working(num_prompt_tokens=prompt.num_prompt_tokens),
                self._record.leg(
                    "prefill", engine.name, progress.ask_spans(engine, progress.hop_id(0))
                ) as leg,
            ):
                num_queued_tokens = engine.num_prompt_tokens
                handover = await (
                    self._await_answer(engine, leg)
                    if early is None
                    else self._stream_answer(engine, early.lease_id, leg)
                )
        except BaseException as error:
            progress.first_token.computes_no_more()
            progress.drop_early()
            if not isinstance(error, EngineFailure | EngineRefusal):
                # The answer may be on its way, and the lease that it speaks of would wait for its
                # deadline.
                progress.lease.release(engine, prompt.hop_id)
            raise
        progress.first_token.computes_no_more()
        if engine.costs is None:
            took_s = self._state.now() - asked_at
            engine.pace.took("first_token", took_s, num_queued_tokens + OVERHEAD_TOKENS)
        self._state.pool.succeeded(engine)
        self._state.pool.served(engine, request, 0)
        return handover

    async def _stream_answer(self, engine: Engine, lease_id: LeaseId, leg: Leg) -> Handover:
        """Tell the client the first token when it is there; its lease may come later."""
        prompt, answer = self._prompt, HandoverStream(engine)
        prompt_token_ids = prompt.wanted_token_ids
        body = prompt.prefill_body(knows_whole_request=True, lease_id=lease_id)
        async with self._state.client.stream(
            engine, prompt.endpoint.path, body, self._progress.headers(attempt=0)
        ) as stream:
            self._progress.sink.ignores(stream.ignored_fields)
            while (chunk := await stream.next_chunk()) is not None:
                with malformed_is_failure(engine):
                    answer.take(chunk)
                    if prompt_token_ids is not None:
                        for choice in chunk["choices"]:
                            choice["prompt_token_ids"] = prompt_token_ids
                if not answer.is_final:
                    self._refuse_too_long(answer.num_prompt_tokens)
                await self._progress.tell(engine, chunk)
            leg.hear(stream.report)
        with malformed_is_failure(engine):
            return answer.handover()

    async def _await_answer(self, engine: Engine, leg: Leg) -> Handover:
        prompt = self._prompt
        body = prompt.prefill_body(knows_whole_request=engine.capabilities.gives_first_token)
        answer = await self._state.client.ask(
            engine, prompt.endpoint.path, body, self._progress.headers(attempt=0)
        )
        self._progress.sink.ignores(answer.ignored_fields)
        with malformed_is_failure(engine):
            handover = read_handover(engine, answer.body, is_chat=prompt.endpoint.is_chat)
        leg.hear(handover.report)
        leg.counts(handover.usage)
        if handover.work is not None:
            self._state.client.hear(engine, handover.work)
        for chunk in handover.chunks:
            refuse_broken(engine, chunk)
        return handover

    async def _begin_answer(self, handover: Handover) -> None:
        """Tell the client what prefill knows, if the decode engines need not tell it again."""
        progress = self._progress
        progress.lease.hand_over(handover)
        progress.attempts.begin_decode()
        if handover.engine.capabilities.needs_proof:
            progress.transcript.note_prefill(handover.usage)
        # Before anything is sent: this is the last moment for a status.
        if not handover.is_final:
            self._refuse_too_long(handover.num_prompt_tokens)
        # The client gets the first token from prefill only if decode need not say it again.
        progress.first_token_sent = (handover.is_final or progress.transcript.has_tokens) or (
            handover.has_first_tokens and self._state.pool.has_ready("decode", TAKES_FIRST_TOKEN)
        )
        if progress.first_token_sent:
            for chunk in handover.chunks:
                await progress.tell(handover.engine, chunk)
        goes_on = progress.first_token_sent and not handover.is_final
        early = progress.early
        if early is not None and not (goes_on and handover.lease_id == early.lease_id):
            progress.drop_early()

    def _is_taken_over(self, failure: EngineFailure | EngineRefusal) -> bool:
        """Take the route of the engine for which the prompt was asked back, if it was given."""
        route = self._progress.first_token.take_over()
        is_withdrawn = isinstance(failure, EngineFailure) and failure.engine_code == WITHDRAWN_CODE
        if route is None or not is_withdrawn:
            return False
        self._state.metrics.took_over()
        self._progress.routed("decode", route)
        self._progress.follow(route)
        return True

    def _refuse_too_late(self, soonest: Estimate, left_s: float) -> None:
        """Raise OverloadedError for a deadline that no route meets."""
        self._state.metrics.refused_deadline()
        late_s = math.ceil(min(max(0.0, soonest.total_s - left_s), MAX_RETRY_AFTER_S))
        raise OverloadedError(
            f"the {left_s:.2f} s that are left cannot be met: the first route to end, "
            f"{soonest.route}, is estimated to take {soonest.total_s:.2f} s, "
            f"{soonest.first_token_s:.2f} s to the first token",
            status=503,
            retry_after_s=max(RETRY_AFTER_S, late_s),
            code="deadline_exceeded",
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
