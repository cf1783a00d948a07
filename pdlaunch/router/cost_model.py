"""Estimates what the routes of a request would cost, from what engines have told of themselves.

::

    pair     wait + prompt at prefill │ pull │ tokens at decode
    alone    wait + prompt in chunks that the engine's streams bear │ tokens at the same engine,
             which at a prefill engine prompts to come delay (``exposure.py``)

A route's cost is the time until the request's end, and the time by which it delays all other
streams: what is least is best for all requests together. All functions are pure.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from pdlaunch.protocol.costs import EngineCosts, StreamPauses
from pdlaunch.router.engine import Engine

RouteKind = Literal["pair", "decode", "both", "prefill", "least_work"]
"""A pair of engines; one of this role alone; chosen without costs."""
LATE_PRICE = 0.05
"""Share that counts of the time by which a prompt delays streams, where these have late tokens left
(``StreamPauses``), which are there to be used.

A late token is the first of many that come later by as much, but nobody sees more than the one gap.
Found in the simulator: with 0 they are used up by prompts that gain little, with 1 hardly any is
used (docs/measurements/routing.md has the figures, for most constants of this kind).
"""
MAX_CORRECTION = 4.0
"""Measured times change an estimate by this factor at most: an engine's own costs come from every
step that it has computed, and one request that hung must not outweigh them.
"""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Says what one route would cost."""

    kind: RouteKind
    engines: tuple[str, ...]
    computed_s: float
    """Time to the first token as the engine's costs have it, without anybody's experience."""
    first_token_s: float
    """The same, corrected by what requests really took."""
    total_s: float
    """Time to the last token."""
    delay_s: float
    """Sum of the times by which other streams end later."""
    itl_s: float
    """Longest usual time between two tokens of the streams at the deciding engine."""

    @property
    def cost_s(self) -> float:
        return self.total_s + self.delay_s

    @property
    def route(self) -> str:
        return "->".join(self.engines)


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """Counts what a request needs."""

    num_prompt_tokens: int
    num_output_tokens: float
    num_choices: int = 1


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Describes an engine at one instant: its costs, and what it has to do."""

    engine: Engine
    costs: EngineCosts
    queued_tokens: float
    """Tokens of prompts that are to be computed before a new one."""
    num_streams: int
    """Streams that decode."""
    context_tokens: float
    """Tokens of these."""
    decode_s: float
    """Time of a step with its streams alone."""
    chunk_tokens: int
    """Prompt tokens that such a step may have."""
    long_gaps: float = 0.0
    """Gaps between tokens of its streams that may be long."""
    num_expected: int = 0
    """Streams that begin when their prompts are computed."""
    expected_tokens: float = 0.0
    """Tokens of these prompts."""

    @property
    def launches_s(self) -> float:
        """Return the least that a step with a chunk takes beside the streams."""
        return self.costs.steps.launches_s(self.num_streams + self.chunk_tokens)

    @property
    def is_idle(self) -> bool:
        return not (self.num_streams or self.num_expected or self.queued_tokens)

    def prompt_s(self, num_tokens: float, num_before: float = 0.0) -> float:
        """Return the time until a prompt is computed, after those that wait, beside the streams.

        ``num_tokens`` are to be computed of it, ``num_before`` are cached.
        """
        steps, total = self.costs.steps, self.queued_tokens + num_tokens
        # The part for which streams wait, and the part in chunks beside them.
        apart = total
        if self.num_streams:
            num_pauses = math.ceil(self.long_gaps / self.num_streams) if self.pauses(total) else 0
            apart = min(total, num_pauses * self.costs.pause_tokens)
        num_apart = math.ceil(apart / self.costs.pause_chunk())
        num_beside = self.num_chunks(total - apart)
        tokens_s = steps.tokens_s(self.queued_tokens) + steps.tokens_s(num_tokens, num_before)
        beside_s = tokens_s * (total - apart) / max(total, 1.0)
        return (
            num_apart * steps.step_s
            + (tokens_s - beside_s)
            + max(num_beside * self.decode_s + beside_s, num_beside * self.launches_s)
        )

    def lengthens_s(self, num_tokens: float, num_before: float = 0.0) -> float:
        """Return by how much a prompt lengthens the steps of streams beside which it is computed.

        ``num_tokens`` are to be computed of it, ``num_before`` are cached.
        """
        computed_s = self.costs.steps.tokens_s(num_tokens, num_before)
        # Prompts that wait share their steps, and what launches take.
        num_steps = self.num_chunks(self.queued_tokens + num_tokens) - self.num_chunks(
            self.queued_tokens
        )
        return max(computed_s, num_steps * (self.launches_s - self.decode_s))

    def num_chunks(self, num_tokens: float) -> int:
        """Return in how many steps prompts are computed beside streams, if nobody else comes."""
        return math.ceil(max(0.0, num_tokens) / self.chunk_tokens)

    def pauses(self, num_tokens: float) -> bool:
        """Return whether streams wait while prompts of so many tokens are computed."""
        has_gaps = self.num_streams > 0 and self.long_gaps > 0
        return has_gaps and StreamPauses.are_for(num_tokens, self.chunk_tokens)

    def room_s(self, work: Work) -> float:
        """Return the time until there is a seat and room in the KV cache for one more request.

        As streams end one after the other, each after ``num_output_tokens`` steps.
        """
        num_seats = self.num_streams + self.num_expected
        if not num_seats:
            return 0.0
        lasts_s = work.num_output_tokens * self.decode_s
        lacking_seats = num_seats + work.num_choices - self.costs.max_num_seqs
        num_tokens = work.num_prompt_tokens + work.num_output_tokens * work.num_choices
        held_tokens = self.context_tokens + self.expected_tokens
        lacking_tokens = held_tokens + num_tokens - self.costs.num_kv_tokens
        return lasts_s * max(0.0, lacking_seats / num_seats, lacking_tokens / max(held_tokens, 1.0))


def load_of(engine: Engine, now_at: float) -> Load | None:
    """Return the load of an engine; None while its costs are not known."""
    costs = engine.costs
    if costs is None or costs.steps.tokens_s(1.0) <= 0:
        return None
    num_streams, context_tokens = engine.streams(now_at)
    decode_s = costs.steps.decode_s(num_streams, context_tokens)
    chunk_tokens = costs.chunk_tokens(num_streams, context_tokens)
    # More than nothing, as told above: of a token alone, what it attends to may be all that counts.
    launches_s = costs.steps.launches_s(num_streams + chunk_tokens)
    seconds_per_token = max(
        costs.steps.tokens_s(1.0) + decode_s / chunk_tokens, launches_s / chunk_tokens
    )
    return Load(
        engine=engine,
        costs=costs,
        queued_tokens=engine.queued_tokens(now_at, seconds_per_token),
        num_streams=num_streams,
        context_tokens=context_tokens,
        decode_s=decode_s,
        chunk_tokens=chunk_tokens,
        long_gaps=engine.long_gaps,
        num_expected=engine.num_expected,
        expected_tokens=engine.expected_tokens,
    )


def corrected(engine: Engine, computed_s: float) -> float:
    """Return a time to the first token as it is to be expected after what requests took."""
    expected_s = engine.experience.predict((1.0, computed_s))
    overhead_s = engine.experience.coefficients[0]
    most_s = overhead_s + MAX_CORRECTION * computed_s
    return min(max(expected_s, computed_s / MAX_CORRECTION), most_s)


def estimate_alone(load: Load, work: Work, num_cached: int, exposure: float = 0.0) -> Estimate:
    """Estimate that one engine does all.

    ``exposure``: seconds of coming prompts that a stream will meet there in each of its own.
    """
    num_new = max(1, work.num_prompt_tokens - num_cached)
    computed_s = load.room_s(work) + load.prompt_s(num_new, num_cached)
    steps = load.costs.steps
    chunk_tokens = load.costs.chunk_tokens(load.num_streams, load.context_tokens, num_cached)
    chunk_tokens = min(num_new, chunk_tokens)
    chunk_s = steps.tokens_s(chunk_tokens, num_cached)
    first_token_s = corrected(load.engine, computed_s)
    role = load.engine.role or "both"
    price = LATE_PRICE if load.num_streams and load.long_gaps > 0 else 1.0
    return Estimate(
        kind=role,
        engines=(load.engine.name,),
        computed_s=computed_s,
        first_token_s=first_token_s,
        total_s=first_token_s + (1 + exposure) * _tokens_s(load, work),
        # Prompts that come are delayed by the stream as it is by them.
        delay_s=load.num_streams * load.lengthens_s(num_new, num_cached) * price
        + _crowding_s(load, work)
        + exposure * _tokens_s(load, work),
        itl_s=max(steps.launches_s(load.num_streams + chunk_tokens), load.decode_s + chunk_s)
        if load.num_streams
        else _step_with(load, work),
    )


class PrefillPart(msgspec.Struct, frozen=True):
    """Says what a prompt costs at a prefill engine that hands it over."""

    engine: str
    computed_s: float
    first_token_s: float
    delay_s: float


class DecodePart(msgspec.Struct, frozen=True):
    """Says what the tokens after the first cost at a decode engine, and how much it pulls."""

    engine: str
    num_bytes: int
    rest_s: float
    delay_s: float
    itl_s: float


def estimate_prefill(load: Load, work: Work, num_cached: int) -> PrefillPart:
    """Estimate that an engine computes the prompt, ``num_cached`` tokens of which it has."""
    num_new = max(1, work.num_prompt_tokens - num_cached)
    prompt_only = msgspec.structs.replace(work, num_output_tokens=1.0)
    computed_s = load.room_s(prompt_only) + load.prompt_s(num_new, num_cached)
    return PrefillPart(
        load.engine.name,
        computed_s,
        corrected(load.engine, computed_s),
        load.num_streams * load.lengthens_s(num_new, num_cached),
    )


def estimate_decode(load: Load, work: Work, num_cached: int) -> DecodePart:
    """Estimate that an engine pulls the prompt, but for what it has, and goes on."""
    num_tokens = max(0, work.num_prompt_tokens - num_cached)
    return DecodePart(
        load.engine.name,
        num_tokens * load.costs.kv_bytes_per_token,
        load.room_s(work) + _tokens_s(load, work),
        _crowding_s(load, work),
        _step_with(load, work),
    )


def estimate_pair(prefill: PrefillPart, decode: DecodePart, gigabytes_per_s: float) -> Estimate:
    """Put the parts of two engines together: there are many more pairs than engines.

    ``gigabytes_per_s``: of a pull; 0 where it was not measured, which counts as no time.
    """
    pull_s = decode.num_bytes / (gigabytes_per_s * 1e9) if gigabytes_per_s else 0.0
    return Estimate(
        kind="pair",
        engines=(prefill.engine, decode.engine),
        computed_s=prefill.computed_s,
        first_token_s=prefill.first_token_s,
        total_s=prefill.first_token_s + pull_s + decode.rest_s,
        delay_s=prefill.delay_s + decode.delay_s,
        itl_s=decode.itl_s,
    )


def _step_with(load: Load, work: Work) -> float:
    """Return the time of a decode step with this request, half of its tokens drawn."""
    num_tokens = work.num_prompt_tokens + work.num_output_tokens / 2
    return load.costs.steps.decode_s(
        load.num_streams + load.num_expected + work.num_choices,
        load.context_tokens + load.expected_tokens + work.num_choices * num_tokens,
    )


def _tokens_s(load: Load, work: Work) -> float:
    """Return the time of all tokens after the first.

    Prompts that wait at the engine lengthen the steps in which they are computed.
    """
    waiting_s = load.costs.steps.tokens_s(load.queued_tokens)
    return max(0.0, work.num_output_tokens - 1) * _step_with(load, work) + waiting_s


def _crowding_s(load: Load, work: Work) -> float:
    """Return by how much the tokens of this request delay the other streams in all their steps."""
    others = load.num_streams + load.num_expected
    num_tokens = work.num_prompt_tokens + work.num_output_tokens / 2
    steps = load.costs.steps
    longer_s = work.num_choices * (steps.stream_s + steps.context_s * num_tokens)
    return others * longer_s * max(0.0, work.num_output_tokens - 1)
