"""Routing policies decide which engines serve a prompt.

Everything that a policy may look at is an argument, the clock too, and it changes none of it; what
it may keep is a memory of its own choices. So it can be tested by properties, and a simulator can
replay it on a clock of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.protocol.control import Capabilities, PairReady
from pdlaunch.router.cost_model import Estimate, RouteKind
from pdlaunch.router.engine import Engine, EngineKey
from pdlaunch.router.health import Health, may_pull, survey
from pdlaunch.router.prefix_index import PrefixHashes

Hop = Literal["prefill", "decode"]

Need = Literal["goes_on", "gives_first_token", "awaits_lease"]
"""Names a capability that an engine must have."""
NO_NEEDS: frozenset[Need] = frozenset()
WAITS: frozenset[Need] = frozenset({"awaits_lease"})
MAX_QUEUED = 8
"""Decode is told early only of prompts behind at most so many at the prefill engine.

A prompt further behind would keep decode waiting, and that time counts as decode's work.
"""


class RoutingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Describes a prompt, and how far it has come, to a policy."""

    hop: Hop
    """``prefill``: nobody has computed anything. ``decode``: one engine is to do all that is left,
    with or without blocks of a prefill engine.
    """
    num_prompt_tokens: int = 0
    """Estimated length of the prompt."""
    max_tokens: int | None = None
    num_choices: int = 1
    expected_tokens: float | None = None
    """Output tokens as they are to be expected; None: ``max_tokens``."""
    least_tokens: float | None = None
    """Output tokens of a short answer; None: it may have a single one."""
    prefix: PrefixHashes = ()
    """Stands for the prompt or messages as the client wrote them."""
    wants_pair: bool = False
    """The client asks for a pair of engines, whatever that costs."""
    is_suspect: bool = False
    """A rank may have died of it."""
    tried: frozenset[EngineKey] = frozenset()
    """Engines that failed this prompt and are not to be asked again now."""
    needs: frozenset[Need] = NO_NEEDS
    """The next engine must be able to do this."""
    prefill: str = ""
    """The engine that has computed the prompt and holds its KV blocks; empty: none does."""
    left_s: float | None = None
    """Time until the deadline that its client has stated; None: it has not."""
    alone: str = ""
    """The reason why engines that need proof cannot share the request; empty: they can."""


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Names the engines that a policy has chosen, and why."""

    reason: str
    """Says for people and logs why these engines were chosen."""
    prefill: Engine | None = None
    """Computes the prompt and hands it over; None: the decode engine does all."""
    decode: Engine | None = None
    """With a prefill engine: the one that is told of the prompt while that computes, None: decode
    is chosen afterwards. Alone: the one that is asked now, None: nobody can be asked.
    """
    planned: Engine | None = None
    """The decode engine that is meant to go on, whether it is told early or not; None: any."""
    estimate: Estimate | None = None
    """The estimated costs of the route; None: it was chosen without."""
    alternatives: tuple[Estimate, ...] = ()
    """The best route of each other kind."""
    too_late: Estimate | None = None
    """The first to end of all routes, where even that misses the deadline: no engine is named."""
    tries: frozenset[str] = frozenset()
    """Names of engines that were left out until now: the request shows whether they work again."""
    left_out: Mapping[str, str] = {}
    """Engines that get nothing new, and why."""

    @property
    def kind(self) -> RouteKind:
        return "least_work" if self.estimate is None else self.estimate.kind

    @property
    def name(self) -> str:
        """Return the names of the engines in their order."""
        if self.estimate is not None:
            return self.estimate.route
        engines = (self.prefill, self.decode)
        return "->".join(engine.name for engine in engines if engine is not None)

    @property
    def explained(self) -> str:
        """Return reason, estimates and alternatives in one line."""
        if self.estimate is None:
            return self.reason
        told = [_tell(estimate) for estimate in (self.estimate, *self.alternatives)]
        return f"{self.reason}: {', else '.join(told)}"

    def __str__(self) -> str:
        engines = (self.prefill, self.decode)
        names = [engine.name for engine in engines if engine is not None]
        return f"{' -> '.join(names) or 'no engine'}: {self.reason}"


class PrefixIndex(Protocol):
    """Knows approximately what the engines' prefix caches hold."""

    def num_cached_tokens(self, engine: Engine, prefix: PrefixHashes) -> int:
        """Return how many tokens of the prefix this engine need not compute."""


class NoIndex:
    """Knows nothing, as a PrefixIndex."""

    def num_cached_tokens(self, engine: Engine, prefix: PrefixHashes) -> int:
        return 0


class Policy(Protocol):
    """Chooses the engines of a prompt, again for each hop and after each failure."""

    def choose(
        self,
        request: RoutingRequest,
        engines: Sequence[Engine],
        pairs: Sequence[PairReady],
        index: PrefixIndex,
        now_at: float,
    ) -> Route:
        """Return the route. ``pairs``: proven paths between ranks; ``now_at``: the pool's clock."""

    def take_over(
        self,
        request: RoutingRequest,
        prefill: Engine,
        engines: Sequence[Engine],
        pairs: Sequence[PairReady],
        index: PrefixIndex,
        now_at: float,
    ) -> Route | None:
        """Return the route of one engine for a prompt that waits last at ``prefill``; None: it
        stays there.
        """


class LeastWork:
    """Gives each hop to the ready engine of its role with the least outstanding work.

    Work is prompt tokens for prefill and active streams for decode. Pairs come first; where none
    can take a prompt, an engine of both roles does all of it. A role is a preference: where nobody
    else is left, any engine serves. Engines that fail or are slow (``health.py``) are the last
    choice, those that fail least first, until a try is due.
    """

    def choose(
        self,
        request: RoutingRequest,
        engines: Sequence[Engine],
        pairs: Sequence[PairReady],
        index: PrefixIndex,
        now_at: float,
    ) -> Route:
        health = survey(engines, now_at)
        route = self._choose(request, engines, health, now_at)
        named = {one.name for one in (route.prefill, route.decode) if one is not None}
        return msgspec.structs.replace(
            route, left_out=health.left_out, tries=health.wants_try & named
        )

    def _choose(
        self, request: RoutingRequest, engines: Sequence[Engine], health: Health, now_at: float
    ) -> Route:
        if request.hop == "decode":
            return _serve_alone(request, engines, health, now_at)
        if request.max_tokens == 1:
            return Route(reason="one token needs no decode engine")
        if not any(engine.ready and engine.role == "decode" for engine in engines):
            return Route(reason="no decode engine is ready")
        if request.alone and any(engine.capabilities.needs_proof for engine in engines):
            return Route(reason=request.alone)
        able = list(_with_pullers(engines, now_at))
        prefill = least_work(able, "prefill", health, strict=True, tried=request.tried)
        if prefill is None:
            is_left = any(engine.ready and engine.role == "prefill" for engine in engines)
            return Route(reason=f"no {'pair is proven' if is_left else 'prefill engine is ready'}")
        return Route(
            reason="least work",
            prefill=prefill,
            decode=_told_early(request, prefill, engines, health, now_at),
        )

    def take_over(
        self,
        request: RoutingRequest,
        prefill: Engine,
        engines: Sequence[Engine],
        pairs: Sequence[PairReady],
        index: PrefixIndex,
        now_at: float,
    ) -> Route | None:
        return None  # nobody knows what it would gain


def _tell(estimate: Estimate) -> str:
    return (
        f"{estimate.route} first token {estimate.first_token_s * 1000:.1f} ms, "
        f"all {estimate.total_s * 1000:.0f} ms, others +{estimate.delay_s * 1000:.1f} ms"
    )


def least_work(
    engines: Sequence[Engine],
    role: Role,
    health: Health,
    *,
    strict: bool = False,
    tried: Collection[EngineKey] = (),
    needs: Collection[Need] = NO_NEEDS,
) -> Engine | None:
    """Return the engine with the least work for ``role``, None when none can take it.

    ``strict``: only engines of this role, and none that is left out.
    """
    candidates = [
        engine
        for engine in engines
        if engine.ready
        and engine.key not in tried
        and covers(engine.capabilities, needs)
        and not (strict and (engine.role != role or engine.name not in health.usable))
    ]
    return min(candidates, key=lambda engine: _rank(engine, role, health), default=None)


def covers(has: Capabilities, needs: Collection[Need]) -> bool:
    """Tell whether an engine can do everything that is needed."""
    return all(getattr(has, need) for need in needs)


def _with_pullers(engines: Sequence[Engine], now_at: float) -> Iterator[Engine]:
    """Yield the engines whose KV blocks a ready decode engine may be handed."""
    pullers = {
        engine.name: engine for engine in engines if engine.ready and engine.role == "decode"
    }
    for engine in engines:
        names = pullers if engine.peers is None else engine.peers & pullers.keys()
        if any(may_pull(pullers[name], engine, now_at) for name in names):
            yield engine


def _serve_alone(
    request: RoutingRequest,
    engines: Sequence[Engine],
    health: Health,
    now_at: float,
) -> Route:
    role = _role_alone(request, engines)
    prefill = next((engine for engine in engines if engine.name == request.prefill), None)
    if prefill is not None and (prefill.capabilities.needs_proof or prefill.peers is not None):
        able = [engine for engine in engines if may_pull(engine, prefill, now_at)]
        puller = least_work(
            able, "decode", health, strict=True, tried=request.tried, needs=request.needs
        )
        if puller is not None:
            return Route(decode=puller, reason=f"least work of those proven with {prefill.name}")
    engine = least_work(engines, role, health, tried=request.tried, needs=request.needs)
    if engine is None:
        return Route(reason="no engine is ready")
    reason = "least work" if engine.role == role else f"no {role} engine is ready"
    return Route(decode=engine, reason=reason)


def _role_alone(request: RoutingRequest, engines: Sequence[Engine]) -> Role:
    """Return the role of engines that are best for all that is left of a request."""
    if request.max_tokens == 1:
        return "prefill"
    if request.prefill:
        return "decode"
    has_both = any(
        engine.role == "both"
        and engine.ready
        and engine.key not in request.tried
        and covers(engine.capabilities, request.needs)
        for engine in engines
    )
    return "both" if has_both else "decode"


def _told_early(
    request: RoutingRequest,
    prefill: Engine,
    engines: Sequence[Engine],
    health: Health,
    now_at: float,
) -> Engine | None:
    if not may_tell_early(request, prefill):
        return None
    pullers = [engine for engine in engines if may_pull(engine, prefill, now_at)]
    return least_work(pullers, "decode", health, strict=True, needs=WAITS)


def may_tell_early(request: RoutingRequest, prefill: Engine) -> bool:
    """Tell whether decode may be told of the prompt while this engine computes it."""
    return not (
        request.is_suspect
        or request.num_choices > 1
        or prefill.num_works > MAX_QUEUED
        or prefill.lender is None
        or not covers(prefill.capabilities, WAITS)
    )


def _rank(engine: Engine, role: Role, health: Health) -> tuple[int, int, bool, int, int, int]:
    """Return a key whose smallest value is best; engines of equal work take turns."""
    work = (
        (engine.num_prompt_tokens, engine.num_streams)
        if role == "prefill"
        else (engine.num_streams, engine.num_prompt_tokens)
    )
    # What is wrong with an engine outweighs a wrong role: any can do the work of the other role.
    is_usable = engine.name in health.usable
    trouble = 0 if is_usable else 1 + engine.breaker.is_tripped * engine.breaker.num_failures
    is_tried = engine.name in health.wants_try
    return (trouble, _distance(engine, role), not is_tried, *work, engine.num_picks)


def _distance(engine: Engine, role: Role) -> int:
    """Return 0 for an engine of the role; of others, those of both roles are next."""
    return 0 if engine.role == role else 1 if engine.role == "both" else 2
