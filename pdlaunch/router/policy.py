"""Chooses the engines of a prompt by the load of each engine.

::

    pair    wait at prefill │ compute │ hand over │ tokens at decode
    local   wait at decode  │ compute │ tokens at the same engine

Pairs come first. A prompt is computed at the decode engine if that takes less time than a
hand-over, or if prompts wait at prefill and the decode engine would be done sooner. An idle prefill
engine always gets its share, or its measured speed would never change. Load is counted in tokens:
the tokens of waiting prompts, and the tokens that streams hold in the KV cache. Tokens that an
engine has cached, by the index, do not count there. The choice depends only on its arguments.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec
import xxhash

from pdlaunch.config.roles import Role
from pdlaunch.config.shared_settings import ONE_ENGINE_POLICIES, RoutingPolicy
from pdlaunch.router.engine import Engine, EngineKey
from pdlaunch.router.kv_index import KVIndex, PromptTokens

Hop = Literal["prefill", "decode"]

# A decode engine computes up to this many uncached tokens itself if a hand-over would take longer.
# On one H200 a step with 64 tokens of a prompt takes 1.3 ms longer, a hand-over 12 ms; on a CPU 64
# tokens take 50 ms and more.
SHORT_TOKENS = 64
HAND_OVER_S = 0.012
# Minimum assumed speed of an engine, as a share of the fastest engine's speed, so that an engine
# measured during its warm-up gets requests again.
LEAST_SPEED = 0.25
# A decode engine computes a prompt only if it saves more than this share of the computation time,
# since the streams of the engine wait during the computation.
MARGIN = 0.5
# Weight of a token in the KV cache, in uncached prompt tokens: a stream makes every later step a
# little longer. Two H200s, 512 tokens in, 128 at once: 1/12 gives 4 % more tokens/s than 1/32 and a
# TTFT p99 that is 9 % longer. Simulated: with 1/64, ITL p99 doubles at 50 requests a second.
KV_WEIGHT = 1 / 32
# Cached prefixes do not count at an engine that has recently stored more than this many times the
# mean of its role. Of two engines, this is an engine with three times the tokens of the other.
SHARE = 1.5


class RoutingRequest(msgspec.Struct, frozen=True, kw_only=True):
    num_prompt_tokens: int = 0  # estimated
    max_tokens: int | None = None
    tokens: PromptTokens | None = None  # None: unknown, so the load alone decides
    session: str = ""  # requests of one session go to the same engines
    wants_pair: bool = False  # the client asks for a pair of engines
    is_suspect: bool = False  # the prompt may have killed a rank
    # One engine must do the rest: the prompt is computed, or no attempt at pairs is left.
    is_begun: bool = False
    holder: Engine | None = None  # has blocks of this prompt that can still be pulled
    tried: frozenset[EngineKey] = frozenset()  # engines that must not be asked now
    must_continue: bool = False  # the engine must continue after the tokens that the client has
    alone: str = ""  # why two engines of vLLM cannot share the request; empty: they can

    def is_done_by(self, engine: Engine) -> bool:
        return engine.capabilities.can_continue or not self.must_continue


class Route(msgspec.Struct, frozen=True, kw_only=True):
    reason: str
    prefill: Engine | None = None  # computes the prompt; None: the decode engine does all
    decode: Engine | None = None  # None: no engine is available
    is_fallback: bool = False  # a pair was wanted, but none can take the prompt

    @property
    def engines(self) -> tuple[Engine, ...]:
        return tuple(engine for engine in (self.prefill, self.decode) if engine is not None)

    @property
    def kind(self) -> str:
        if self.prefill is not None:
            return "pair"
        return "none" if self.decode is None else self.decode.role or "both"

    @property
    def name(self) -> str:
        return "->".join(engine.name for engine in self.engines)


class _Offer(NamedTuple):
    engine: Engine
    num_tokens: int  # uncached tokens of the prompt
    wait_s: float
    compute_s: float

    @property
    def first_token_s(self) -> float:
        return self.wait_s + self.compute_s

    @property
    def cost_s(self) -> float:
        """Return the time to the first token, plus a charge for the streams that slow decoding."""
        per_token_s = self.compute_s / self.num_tokens
        return self.first_token_s + KV_WEIGHT * self.engine.kv_tokens * per_token_s


def choose(
    request: RoutingRequest,
    engines: Sequence[Engine],
    index: KVIndex,
    now_at: float,
    policy: RoutingPolicy,
) -> Route:
    """Choose the engines for the remaining work of a request."""
    return _Choice(request, engines, index, now_at, policy).route()


@dataclass(eq=False)
class _Choice:
    """Makes one choice. Does not change its inputs."""

    _request: RoutingRequest
    _engines: Sequence[Engine]
    _index: KVIndex
    _now_at: float
    _policy: RoutingPolicy

    def __post_init__(self) -> None:
        self._fastest = max((one.tokens_per_s for one in self._engines), default=0.0) or 1.0
        self._over_share = set() if self._request.tokens is None else self._find_over_share()
        self._uncached: dict[str, int] = {}  # tokens, by engine

    def route(self) -> Route:
        request = self._request
        reason = self._why_no_pair()
        if not reason and (pair := self._best_pair()) is not None:
            first, decode = pair
            local = self._best_local()
            if local is not None and (reason := self._why_local(local, first)):
                return Route(decode=local.engine, reason=reason)
            return Route(prefill=first.engine, decode=decode, reason="the pair that waits least")
        is_there = any(one.ready and one.role == "prefill" for one in self._engines)
        reason = reason or ("no pair is proven" if is_there else "no prefill engine is ready")
        if (alone := self._alone()) is None:
            return Route(reason="no engine is ready")
        wants_pair = any(one.role != "both" for one in self._engines)
        return Route(
            decode=alone,
            reason=reason,
            is_fallback=wants_pair and not request.is_begun and request.max_tokens != 1,
        )

    def _offer(self, engine: Engine) -> _Offer:
        speed = max(engine.tokens_per_s or self._fastest, LEAST_SPEED * self._fastest)
        num_tokens = self._num_uncached(engine)
        wait_s = engine.waiting_tokens(self._now_at, speed) / speed
        return _Offer(engine, num_tokens, wait_s, num_tokens / speed)

    def _num_uncached(self, engine: Engine) -> int:
        request, name = self._request, engine.name
        if name not in self._uncached:
            tokens = None if name in self._over_share else request.tokens
            num_cached, _ = self._index.find(engine, tokens)
            self._uncached[name] = max(1, request.num_prompt_tokens - num_cached)
        return self._uncached[name]

    def _is_short(self, engine: Engine) -> bool:
        """Return whether streams would have to wait for KV blocks. Cached tokens need no room."""
        _, room = self._index.num_tokens(engine.name)
        return 0 < room < engine.kv_tokens + self._num_uncached(engine)

    def _find_over_share(self) -> set[str]:
        """Return the engines that have recently stored much more than others of their role."""
        # Otherwise all chats with the same system prompt would go to the engine that had it first,
        # even when the caches of the others are full of old blocks.
        by_role: dict[Role | None, list[Engine]] = defaultdict(list)
        for engine in self._engines:
            if engine.ready and engine.name in self._index:
                by_role[engine.role].append(engine)
        crowded: set[str] = set()
        for engines in by_role.values():
            tokens = {engine.name: self._index.num_tokens(engine.name) for engine in engines}
            # Where the size of a cache is unknown, all caches count as equally large.
            rooms = [room for _, room in tokens.values()]
            unit = {name: room if all(rooms) else 1 for name, (_, room) in tokens.items()}
            new = {name: stored / unit[name] for name, (stored, _) in tokens.items()}
            share = SHARE * sum(new.values()) / len(new)
            own = self._request.num_prompt_tokens
            crowded |= {name for name in new if new[name] > share + own / unit[name]}
        return crowded

    def _home(self, engines: Iterable[Engine]) -> Engine | None:
        """Return the engine of the request's session; it moves only when that engine leaves."""

        def weight(engine: Engine) -> int:
            return xxhash.xxh3_64_intdigest(f"{self._request.session}\0{engine.name}".encode())

        return max(engines, key=weight, default=None) if self._request.session else None

    def _takes(self, engine: Engine) -> bool:
        """Return True if the engine may get the request; tripped ones are tried with new ones."""
        health = engine.health
        if not engine.ready or engine.key in self._request.tried:
            return False
        return not health.is_tripped if self._request.tried else health.takes(self._now_at)

    def _why_no_pair(self) -> str:
        request, engines = self._request, self._engines
        if request.is_begun:
            name = None if request.holder is None else request.holder.name
            return f"takes over what {name} has computed" if name else "goes on with what is left"
        if request.max_tokens == 1:
            return "one token needs no decode engine"
        if not any(engine.ready and engine.role == "decode" for engine in engines):
            return "no decode engine is ready"
        if request.alone and any(engine.capabilities.is_vllm for engine in engines):
            return request.alone
        return ""

    def _best_pair(self) -> tuple[_Offer, Engine] | None:
        """Return the prefill engine with the earliest first token; and, of the decode engines that
        may pull from it, the engine that would then hold the fewest tokens.
        """
        usable = [engine for engine in self._engines if self._takes(engine)]
        decodes = {engine.name: engine for engine in usable if engine.role == "decode"}
        offers = [self._offer(engine) for engine in usable if engine.role == "prefill"]
        home = self._home(offer.engine for offer in offers)

        def rank(one: _Offer) -> tuple[float, ...]:
            is_try = one.engine.health.is_tripped
            return not is_try, one.engine is not home, one.first_token_s, one.engine.last_pick

        def load(one: Engine) -> tuple[float, ...]:
            is_try = one.health.is_tripped or one.health.pull(first.engine.key).is_tripped
            place = not is_try, self._is_short(one), one is not decode_home
            num_held = one.kv_tokens + self._num_uncached(one)
            return *place, num_held, one.num_streams, one.last_pick

        for first in sorted(offers, key=rank):
            peers = first.engine.entry.peers
            names = decodes if peers is None else decodes.keys() & set(peers)
            near = [decodes[name] for name in names]
            pullers = [engine for engine in near if may_pull(engine, first.engine, self._now_at)]
            decode_home = self._home(pullers)
            if pullers:
                return first, min(pullers, key=load)
        return None

    def _best_local(self) -> _Offer | None:
        """Return the decode engine that would compute the prompt itself at the lowest cost."""
        request = self._request
        wants_pair = request.wants_pair or request.is_suspect or request.tried
        if self._policy not in ONE_ENGINE_POLICIES or wants_pair:
            return None
        prefills = [one for one in self._engines if one.ready and one.role == "prefill"]
        # Engines that share a GPU with a prefill engine would take time from it. Where devices are
        # not known, each engine counts as having its own.
        gpus = {device for one in prefills for device in one.devices} - {"cpu"}
        offers = [
            self._offer(engine)
            for engine in self._engines
            if engine.role != "prefill"
            and gpus.isdisjoint(engine.devices)
            and self._takes(engine)
            and request.is_done_by(engine)
            and not self._is_short(engine)
        ]
        home = self._home(offer.engine for offer in offers if offer.engine.role == "decode")

        def rank(one: _Offer) -> tuple[float, ...]:
            return one.engine is not home, one.cost_s, one.engine.last_pick

        return min(offers, key=rank, default=None)

    def _why_local(self, local: _Offer, first: _Offer) -> str:
        """Return why the decode engine should compute the prompt; empty if it should not."""
        # The streams of the decode engine wait while it computes the prompt.
        local_s = local.first_token_s + local.compute_s
        # The next turn of a chat: decode has the answers, which prefill would have to compute.
        has_more = local.num_tokens < first.num_tokens and local.wait_s <= first.first_token_s
        if local.num_tokens <= SHORT_TOKENS and (
            has_more or local_s <= first.first_token_s + HAND_OVER_S
        ):
            return "little is left to compute"
        if first.wait_s and local.cost_s + MARGIN * local.compute_s <= first.first_token_s:
            return "the prefill queue is longer"
        return ""

    def _alone(self) -> Engine | None:
        """Return the engine to do all remaining work, if necessary one of another role."""
        request, holder = self._request, self._request.holder
        candidates = [
            engine
            for engine in self._engines
            if engine.ready and engine.key not in request.tried and request.is_done_by(engine)
        ]
        if holder is not None:
            takers = [one for one in candidates if one.role == "decode" and self._takes(one)]
            pullers = [one for one in takers if may_pull(one, holder, self._now_at)]
            candidates = pullers or candidates
        role: Role = "decode"
        if request.max_tokens == 1:
            role = "prefill"
        elif holder is None and any(engine.role == "both" for engine in candidates):
            role = "both"
        home = self._home(engine for engine in candidates if engine.role == role)

        def rank(engine: Engine) -> tuple[float, ...]:
            takes = self._takes(engine)
            trouble = 0 if takes else 1 + engine.health.num_failures
            # Failures outweigh a wrong role: every engine can do the work of the other role.
            distance = 0 if engine.role == role else 1 if engine.role == "both" else 2
            is_try = takes and engine.health.is_tripped
            cost = engine.kv_tokens if holder is not None else self._offer(engine).cost_s
            place = trouble, distance, not is_try, engine is not home
            return *place, cost, engine.num_streams, engine.last_pick

        return min(candidates, key=rank, default=None)


def may_pull(decode: Engine, prefill: Engine, now_at: float) -> bool:
    """Return whether ``decode`` may be handed KV blocks of ``prefill``, and pulls work."""
    return decode.may_pull_from(prefill) and decode.health.pull(prefill.key).takes(now_at)
