"""Knows where one prompt stands: what its client has, what was tried, and who is asked next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Protocol

from pdlaunch.http.errors import RANK_LOST
from pdlaunch.http.headers import REQUEST_ID_HEADER
from pdlaunch.protocol.ids import HopId
from pdlaunch.router.client_request import PromptRequest
from pdlaunch.router.early_decode import EarlyDecode
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_errors import EngineFailure, EngineRefusal, malformed_is_failure
from pdlaunch.router.engine_stream import Chunk
from pdlaunch.router.first_token import FirstTokenWatch
from pdlaunch.router.leg import AskSpans
from pdlaunch.router.metrics import EarlyOutcome
from pdlaunch.router.policy import NO_NEEDS, Hop, Need, Route, RoutingRequest, covers
from pdlaunch.router.prompt_lease import PromptLease
from pdlaunch.router.recovery import Attempts
from pdlaunch.router.request_record import RequestRecord
from pdlaunch.router.state import RouterState
from pdlaunch.router.transcript import Transcript

TAKES_FIRST_TOKEN: frozenset[Need] = frozenset({"gives_first_token"})
_RESUMES: frozenset[Need] = frozenset({"goes_on"})
_BROKEN = frozenset({"error", "abort"})
"""Reasons with which an engine gives a request up that nobody has cancelled."""


class ChunkSink(Protocol):
    """Takes the chunks of all prompts of a request."""

    @property
    def takes_tokens(self) -> bool:
        """Tell whether ``tokens`` may be called."""

    def ignores(self, names: Iterable[str]) -> None:
        """Take the names of fields that an engine has ignored; it comes before any chunk."""

    def routed(self, prompt: PromptRequest, route: Route) -> None:
        """Take the route of a prompt, again when another one is taken."""

    async def chunk(
        self,
        prompt: PromptRequest,
        transcript: Transcript,
        chunk: Chunk,
        *,
        more_follows: bool,
    ) -> None:
        """Take one chunk that is new to the client.

        ``more_follows``: the next one is here already, so that both may be sent together; else
        ``flush`` comes when nothing of it is new.
        """

    async def flush(self) -> None:
        """Send what was held back for the next chunk."""

    async def tokens(self, chunk: Chunk, num_tokens: int, *, more_follows: bool) -> None:
        """Take so many tokens and their text for the first choice, and nothing else."""


class PromptProgress:
    """Is shared by the hops of one prompt; all that its client is sent goes through ``tell``."""

    def __init__(
        self,
        prompt: PromptRequest,
        state: RouterState,
        sink: ChunkSink,
        record: RequestRecord,
        wanted_at: float | None,
    ) -> None:
        self.prompt = prompt
        self.state = state
        self.sink = sink
        self.record = record
        self.transcript = Transcript(
            prompt.num_choices, keeps_text=prompt.is_stream and state.pool.has_own_fields
        )
        record.counts(self.transcript)
        self.attempts = Attempts(state)
        self.lease = PromptLease(state)
        self.first_token = FirstTokenWatch(state)
        self.early: EarlyDecode | None = None
        """The decode engine that was told of the prompt while prefill computed it."""
        self.first_token_sent = False
        """The client has the first tokens from prefill, so that decode must not say them again."""
        self.decode_has_answered = False
        self.left_out: Mapping[str, str] = {}
        """Engines that got nothing when the policy was last asked, and why."""
        self._wanted_at = wanted_at
        self._prefix = prompt.prefix
        self._planned: Engine | None = None
        """The engine that the route names for what is left, until it has been asked."""
        self._goes_on_at: Engine | None = None
        """The engine of which a token was told that was not the first: more of them need no
        ceremony.
        """
        self._first_told_at: float | None = None
        """Instant of the client's first token; None once it has the second one."""

    @property
    def left_s(self) -> float | None:
        """Return the time until the deadline that the client has stated; None: it has not."""
        return None if self._wanted_at is None else self._wanted_at - self.state.now()

    @property
    def must_resume(self) -> bool:
        """Tell whether the next engine has to go on after tokens that the client has.

        Those that prefill has drawn need no resumption as long as decode has added none: they are
        handed over with the blocks.
        """
        return (
            self.decode_has_answered or self.lease.handover is None
        ) and self.transcript.has_tokens

    def routing_request(self, hop: Hop) -> RoutingRequest:
        """Say where the prompt stands, as the policy sees it."""
        if self.must_resume:
            needs = _RESUMES
        else:
            needs = TAKES_FIRST_TOKEN if self.first_token_sent else NO_NEEDS
        prompt = self.prompt
        return RoutingRequest(
            hop=hop,
            num_prompt_tokens=prompt.num_prompt_tokens,
            max_tokens=prompt.max_tokens,
            num_choices=prompt.num_choices,
            expected_tokens=self.state.pool.answer_lengths.usual_tokens,
            least_tokens=self.state.pool.answer_lengths.least_tokens,
            prefix=self._prefix,
            wants_pair=prompt.wants_pair,
            is_suspect=self.state.suspects.is_suspect(prompt.origin),
            tried=frozenset(self.attempts.tried),
            needs=needs,
            prefill=self.lease.untaken_at,
            left_s=self.left_s,
            alone=prompt.alone,
        )

    def routed(self, hop: Hop, route: Route) -> None:
        """Note what the policy has decided."""
        self.record.routed(hop, route)
        self.left_out = route.left_out

    def follow(self, route: Route) -> None:
        """Note what was chosen for a prompt that nobody has computed."""
        self.attempts.follow(route)
        self.sink.routed(self.prompt, route)
        self._planned = route.planned if route.prefill is not None else route.decode
        self.first_token.promise(route)

    def take_planned(self) -> Engine | None:
        """Return the engine that the route named, once, if it can still be asked."""
        engine, self._planned = self._planned, None
        is_usable = engine is not None and self.state.pool.lists(engine) and not self.must_resume
        return engine if is_usable else None

    def headers(self, attempt: int) -> dict[str, str]:
        """Return the headers of a call."""
        return (
            self.prompt.headers
            | self.state.suspects.header(self.prompt.origin)
            | {REQUEST_ID_HEADER: self.hop_id(attempt)}
        )

    def ask_spans(self, engine: Engine, hop_id: HopId) -> AskSpans | None:
        """Return what asks the engine for its spans of a call that was cut; None: it has none."""
        if not covers(engine.capabilities, TAKES_FIRST_TOKEN):
            return None
        return partial(self.state.client.read_spans, engine, hop_id)

    def hop_id(self, attempt: int) -> HopId:
        """Name each attempt differently: an engine may still hold blocks for the one before."""
        hop_id = self.prompt.hop_id
        return hop_id if attempt == 0 else HopId(f"{hop_id}-r{attempt}")

    async def tell(self, engine: Engine, chunk: Chunk, *, more_follows: bool = False) -> None:
        """Send the client what is new to it. Raises EngineFailure when the engine gives up."""
        if self._goes_on_at is engine and (num_tokens := self.transcript.extend(chunk)):
            await self.sink.tokens(chunk, num_tokens, more_follows=more_follows)
            return
        with malformed_is_failure(engine):
            refuse_broken(engine, chunk)
            has_news = self.transcript.admit(chunk)
            self.attempts.heard()
        if self.transcript.has_tokens:
            if engine.breaker.is_tripped:
                self.state.pool.answers(engine)
            self.first_token.came(engine, as_meant=not self.attempts.has_failed)
        if has_news:
            self._time_second_token(engine)
            await self.sink.chunk(self.prompt, self.transcript, chunk, more_follows=more_follows)
        elif not more_follows:
            await self.sink.flush()
        if self.transcript.num_tokens > 1 and self.prompt.index == 0 and self.sink.takes_tokens:
            self._goes_on_at = engine

    async def hear_cause(self, engine: Engine, failure: EngineFailure | EngineRefusal) -> None:
        """Learn whether the engine died of this request before another one gets it.

        Raises KillsEngineError if it did, and not for the first time.
        """
        if isinstance(failure, EngineFailure) and failure.engine_code == RANK_LOST:
            await self.state.news_of_death(engine)
        self.state.suspects.check(self.prompt.origin)

    def drop_early(self, outcome: EarlyOutcome = "dropped") -> None:
        """End the stream of the engine that was told early, if there is one."""
        early, self.early = self.early, None
        if early is not None:
            self.state.metrics.told_early(outcome)
            early.leg.was_dropped |= outcome == "dropped"
            self.state.spawn(early.close())

    def end(self) -> None:
        """Give back what the prompt still holds, however it has ended."""
        self.first_token.computes_no_more()
        self.drop_early()
        self.state.waiting.consider()
        self.lease.end(self.attempts.tried)
        # Its traceback leads back here: a cycle would keep the body in memory.
        self.attempts.forget()

    def _time_second_token(self, engine: Engine) -> None:
        """Measure what the hand-over takes of a client's time, where there is one choice."""
        num_tokens = self.transcript.num_tokens
        if num_tokens == 1 and self.prompt.num_choices == 1:
            self._first_told_at = self._first_told_at or self.state.now()
        elif num_tokens > 1 and self._first_told_at is not None:
            told_s, self._first_told_at = self.state.now() - self._first_told_at, None
            handover = self.lease.handover
            if handover is not None and handover.engine is not engine:
                self.state.metrics.second_token(handover.engine.name, engine.name, told_s)


def refuse_broken(engine: Engine, chunk: Chunk) -> None:
    """Raise EngineFailure for a chunk with which the engine gives the request up."""
    for choice in chunk["choices"]:
        if choice.get("finish_reason") in _BROKEN:
            raise EngineFailure(engine, "gave the request up")
