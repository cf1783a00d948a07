"""Chooses the engines of a prompt by what waits at each of them.

::

    pair    wait at prefill │ compute │ hand over │ tokens at decode
    local   wait at decode  │ compute │ tokens at the same engine

A pair is what a deployment is for, so it comes first. A prompt is computed at the decode engine
when little of it has to be computed there, or when that is done before the prefill engine begins.
Load is counted in tokens: those of prompts that wait, and those that streams hold in the KV cache.
Everything that the choice depends on is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.protocol.control import Capabilities
from pdlaunch.protocol.process.bootstrap import RoutingLimits
from pdlaunch.router.engine import Engine, EngineKey
from pdlaunch.router.prefix_index import PrefixHashes, ServedPrefixes

Hop = Literal["prefill", "decode"]
Need = Literal["goes_on", "gives_first_token"]
"""A capability that an engine must have."""

SHORT_TOKENS = 64
"""A decode engine computes up to this many uncached tokens itself: a hand-over would take longer.
On one H200 a step with 64 tokens of a prompt takes 1.3 ms longer, a hand-over 12 ms.
"""
LEAST_SPEED = 0.25
"""An engine is taken to be at least this fast, as a share of the fastest one, so that one measured
while it warmed up is asked again.
"""
MARGIN = 0.5
"""A prompt is computed where it is decoded only if its first token comes sooner there by this share
of its computation, which keeps the streams of that engine waiting.
"""
KV_WEIGHT = 1 / 32
"""Uncached prompt tokens to which a token in the KV cache amounts: a stream makes every later step
a little longer. Simulated (docs/measurements/routing.md): with 1/8, TTFT p99 of bursts is 20 %
worse; with 1/64, ITL p99 doubles at 50 requests a second.
"""


class RoutingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Describes to the policy what is left to do of a prompt."""

    num_prompt_tokens: int = 0
    """Estimated."""
    max_tokens: int | None = None
    prefix: PrefixHashes = ()
    wants_pair: bool = False
    """The client asks for a pair of engines."""
    is_suspect: bool = False
    """A rank may have died of it."""
    is_begun: bool = False
    """One engine has to do all that is left: the prompt is computed, or attempts at pairs are used
    up.
    """
    holder: Engine | None = None
    """The prefill engine whose blocks of this prompt can still be pulled."""
    tried: frozenset[EngineKey] = frozenset()
    """Engines that failed this prompt and are not to be asked now."""
    needs: frozenset[Need] = frozenset()
    """What the engine that goes on must be able to do."""
    alone: str = ""
    """The reason why engines that need proof cannot share the request; empty: they can."""


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Names the engines that the policy has chosen, and why."""

    reason: str
    prefill: Engine | None = None
    """Computes the prompt and hands it over; None: the decode engine does all."""
    decode: Engine | None = None
    """None: no engine can be asked."""
    is_fallback: bool = False
    """A pair was wanted, but none can take the prompt."""
    wait_s: float = 0.0
    """How long other prompts keep the first engine busy; 0 where its speed is not known."""
    left_out: Mapping[str, str] = {}
    """Engines that get nothing new, and why."""

    @property
    def engines(self) -> tuple[Engine, ...]:
        return tuple(engine for engine in (self.prefill, self.decode) if engine is not None)

    @property
    def kind(self) -> str:
        """Return ``pair``, or the role of the one engine."""
        if self.prefill is not None:
            return "pair"
        return "none" if self.decode is None else self.decode.role or "both"

    @property
    def name(self) -> str:
        return "->".join(engine.name for engine in self.engines)

    def __str__(self) -> str:
        return f"{self.name or 'no engine'}: {self.reason}"


class _Offer(NamedTuple):
    """When an engine would have computed the prompt."""

    engine: Engine
    num_tokens: int
    """Uncached tokens of the prompt."""
    wait_s: float
    compute_s: float

    @property
    def first_token_s(self) -> float:
        return self.wait_s + self.compute_s

    @property
    def cost_s(self) -> float:
        """Return the time to the first token, and what the streams there make of it later."""
        per_token_s = self.compute_s / self.num_tokens
        return self.first_token_s + KV_WEIGHT * self.engine.kv_tokens * per_token_s


def choose(
    request: RoutingRequest,
    engines: Sequence[Engine],
    index: ServedPrefixes,
    now_at: float,
    limits: RoutingLimits,
) -> Route:
    """Return the route for what is left of a request."""
    left_out = {
        engine.name: engine.health.why(now_at)
        for engine in engines
        if engine.ready and not engine.health.takes(now_at)
    }
    route = _choose(request, engines, index, now_at, limits)
    return msgspec.structs.replace(route, left_out=left_out) if left_out else route


def _choose(
    request: RoutingRequest,
    engines: Sequence[Engine],
    index: ServedPrefixes,
    now_at: float,
    limits: RoutingLimits,
) -> Route:
    speeds = [engine.tokens_per_s for engine in engines if engine.tokens_per_s]
    fastest = max(speeds, default=1.0)

    def offer(engine: Engine) -> _Offer:
        speed = max(engine.tokens_per_s or fastest, LEAST_SPEED * fastest)
        num_cached = index.num_cached_tokens(engine, request.prefix)
        num_tokens = max(1, request.num_prompt_tokens - num_cached)
        return _Offer(
            engine, num_tokens, engine.waiting_tokens(now_at, speed) / speed, num_tokens / speed
        )

    why_no_pair = _why_no_pair(request, engines)
    if not why_no_pair:
        pair = _best_pair(request, engines, offer, now_at)
        if pair is not None:
            first, decode = pair
            local = _best_local(request, engines, offer, now_at, limits)
            if local is not None and (reason := _why_local(local, first, limits, bool(speeds))):
                return Route(
                    decode=local.engine, reason=reason, wait_s=local.wait_s if speeds else 0.0
                )
            return Route(
                prefill=first.engine,
                decode=decode,
                reason="the pair that waits least",
                wait_s=first.wait_s if speeds else 0.0,
            )
        is_there = any(engine.ready and engine.role == "prefill" for engine in engines)
        why_no_pair = "no pair is proven" if is_there else "no prefill engine is ready"
    alone = _alone(request, engines, offer, now_at)
    if alone is None:
        return Route(reason="no engine is ready")
    return Route(
        decode=alone,
        reason=why_no_pair,
        is_fallback=not request.is_begun and request.max_tokens != 1,
        wait_s=0.0 if request.is_begun or not speeds else offer(alone).wait_s,
    )


def _why_no_pair(request: RoutingRequest, engines: Iterable[Engine]) -> str:
    if request.is_begun:
        name = None if request.holder is None else request.holder.name
        return f"takes over what {name} has computed" if name else "goes on with what is left"
    if request.max_tokens == 1:
        return "one token needs no decode engine"
    if not any(engine.ready and engine.role == "decode" for engine in engines):
        return "no decode engine is ready"
    if request.alone and any(engine.capabilities.needs_proof for engine in engines):
        return request.alone
    return ""


def _best_pair(
    request: RoutingRequest,
    engines: Sequence[Engine],
    offer: Callable[[Engine], _Offer],
    now_at: float,
) -> tuple[_Offer, Engine] | None:
    """Return the prefill engine that has the first token soonest, and the emptiest decode engine of
    those that may pull from it.
    """
    usable = [engine for engine in engines if _takes(request, engine, now_at)]
    decodes = [engine for engine in usable if engine.role == "decode"]
    pullers = {
        engine.name: able
        for engine in usable
        if engine.role == "prefill"
        and engine.key not in request.tried
        and (able := [decode for decode in decodes if may_pull(decode, engine, now_at)])
    }
    if not pullers:
        return None
    first = min(
        (offer(engine) for engine in usable if engine.name in pullers),
        key=lambda one: (
            not one.engine.health.wants_try(now_at),
            one.first_token_s,
            one.engine.num_picks,
        ),
    )
    decode = min(
        pullers[first.engine.name],
        key=lambda one: (
            not one.health.wants_try(now_at),
            one.kv_tokens,
            one.num_streams,
            one.num_picks,
        ),
    )
    return first, decode


def _best_local(
    request: RoutingRequest,
    engines: Sequence[Engine],
    offer: Callable[[Engine], _Offer],
    now_at: float,
    limits: RoutingLimits,
) -> _Offer | None:
    """Return the engine that would compute the prompt soonest where it decodes it."""
    if limits.policy == "pairs" or request.wants_pair or request.is_suspect or request.tried:
        return None
    prefills = [engine for engine in engines if engine.ready and engine.role == "prefill"]
    gpus = {device for engine in prefills for device in engine.devices} - {"cpu"}
    places = {engine.place for engine in prefills}
    unknown = {engine.place for engine in prefills if not engine.devices}

    def has_own_gpu(engine: Engine) -> bool:
        """Return whether no prefill engine is on its GPU; on one host any may be, if unknown."""
        if not engine.devices:
            return engine.place not in places
        return gpus.isdisjoint(engine.devices) and not (unknown and engine.place in unknown)

    offers = [
        offer(engine)
        for engine in engines
        if engine.role != "prefill"
        and _takes(request, engine, now_at)
        and has_own_gpu(engine)
        and covers(engine.capabilities, request.needs)
    ]
    return min(
        offers,
        key=lambda one: (one.cost_s, one.engine.num_picks),
        default=None,
    )


def _why_local(local: _Offer, first: _Offer, limits: RoutingLimits, is_measured: bool) -> str:
    """Return why the prompt is computed where it is decoded; empty: it is not."""
    has_streams = local.engine.num_streams > 0
    longest_s = limits.max_itl_s
    if is_measured and has_streams and longest_s is not None and local.compute_s > longest_s:
        return ""
    if local.num_tokens <= SHORT_TOKENS and local.wait_s <= first.first_token_s:
        return "little is left to compute"
    if local.cost_s + MARGIN * local.compute_s <= first.first_token_s:
        return "the prefill queue is longer"
    most_s = limits.max_ttft_s
    if is_measured and most_s is not None and local.first_token_s <= most_s < first.first_token_s:
        return "keeps max_ttft_ms"
    return ""


def _alone(
    request: RoutingRequest,
    engines: Sequence[Engine],
    offer: Callable[[Engine], _Offer],
    now_at: float,
) -> Engine | None:
    """Return the engine that does all that is left; in need any engine serves, whatever its role
    and its last failures.
    """
    candidates = [
        engine
        for engine in engines
        if engine.ready
        and engine.key not in request.tried
        and covers(engine.capabilities, request.needs)
    ]
    holder = request.holder
    if holder is not None and (holder.capabilities.needs_proof or holder.peers is not None):
        pullers = [
            engine
            for engine in candidates
            if engine.role == "decode"
            and _takes(request, engine, now_at)
            and may_pull(engine, holder, now_at)
        ]
        candidates = pullers or candidates
    role: Role = "decode"
    if request.max_tokens == 1:
        role = "prefill"
    elif holder is None and any(engine.role == "both" for engine in candidates):
        role = "both"

    def rank(engine: Engine) -> tuple[float, ...]:
        takes = _takes(request, engine, now_at)
        trouble = 0 if takes else 1 + engine.health.num_failures
        # What is wrong with an engine outweighs a wrong role: any can do the work of the other.
        distance = 0 if engine.role == role else 1 if engine.role == "both" else 2
        is_try = takes and engine.health.is_tripped
        cost = engine.kv_tokens if holder is not None else offer(engine).cost_s
        return trouble, distance, not is_try, cost, engine.num_streams, engine.num_picks

    return min(candidates, key=rank, default=None)


def _takes(request: RoutingRequest, engine: Engine, now_at: float) -> bool:
    """Return whether an engine gets requests; one that has failed some gets a new one as a try."""
    health = engine.health
    return engine.ready and (health.takes(now_at) if not request.tried else not health.is_tripped)


def covers(has: Capabilities, needs: Collection[Need]) -> bool:
    """Return whether an engine can do everything that is needed."""
    return all(getattr(has, need) for need in needs)


def may_pull(decode: Engine, prefill: Engine, now_at: float) -> bool:
    """Return whether ``decode`` may be handed KV blocks of ``prefill``, and pulls work."""
    return decode.may_pull_from(prefill) and decode.health.pull(prefill.key).takes(now_at)
