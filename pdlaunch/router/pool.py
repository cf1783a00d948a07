"""Holds all engines of the deployment. The registry and the requests change their states.

The pool does no I/O. A role is a preference: every engine can prefill and decode.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

from pdlaunch.config.roles import Role
from pdlaunch.config.shared_settings import RoutingPolicy
from pdlaunch.protocol.control import Entry, ListedState, PairReady, PairSuspect, Registry
from pdlaunch.router.engine import Engine, EngineKey, HealthState, Processes
from pdlaunch.router.kv_index import KVIndex
from pdlaunch.router.policy import Route, RoutingRequest, choose

IDLE_POLL_S = 0.05
# With several API keys, an engine is given prompts of at most this many tokens and seconds of work,
# or a single longer one: on one H200 2,048 tokens take 45 ms, a call to prefill 7 beside its step.
AHEAD_TOKENS, AHEAD_S = 2048, 0.1
# Prompts for pairs wait while a decode engine has this many prompts without a first token.
MAX_UNBEGUN = 8


class EnginePool:
    def __init__(self, clock: Callable[[], float], policy: RoutingPolicy = "load") -> None:
        self.clock = clock
        self.pairs: Sequence[PairReady] = ()  # the paths that are proven now
        self.policy: RoutingPolicy = policy
        self.index = KVIndex()
        self._engines: dict[str, Engine] = {}
        self.registry = Registry(version=0, entries=[], withheld="starting")
        # Engines held by ``hold``: their processes at that time, and the state to show.
        self._held: dict[str, tuple[Processes, ListedState]] = {}
        self._with_ranks: set[str] = set()
        self._num_picks = 0

    @property
    def engines(self) -> list[Engine]:
        return [self._engines[name] for name in sorted(self._engines)]

    async def until_idle(self, name: str, until_at: float) -> int:
        """Wait until an engine has no work, or until the loop's time; return how much is left."""
        now = asyncio.get_running_loop().time
        while (engine := self._engines.get(name)) is not None and engine.num_outstanding:
            if now() >= until_at:
                return engine.num_outstanding
            await asyncio.sleep(IDLE_POLL_S)
        return 0

    def lists(self, engine: Engine) -> bool:
        # The same object: its processes have not been restarted.
        return self._engines.get(engine.name) is engine and engine.ready

    @property
    def is_vllm(self) -> bool:
        return any(engine.capabilities.is_vllm for engine in self._engines.values())

    @property
    def adapters(self) -> set[str]:
        cards = (card for engine in self._engines.values() for card in engine.models)
        return {card.id for card in cards if card.parent}

    def max_model_len(self, role: Role) -> int | None:
        engines = [engine for engine in self._engines.values() if engine.role == role]
        known = (engine.max_model_len for engine in engines if engine.max_model_len)
        return min(known, default=None)

    def may_hand_over(self, prefill: Engine, decode: Engine) -> bool:
        is_there = (
            self.lists(prefill)
            or not decode.capabilities.is_vllm
            # A draining engine stays until the blocks of its prompts are read.
            or (self._engines.get(prefill.name) is prefill and prefill.state == "draining")
        )
        return is_there and decode.may_pull_from(prefill)

    def path(self, prefill: Engine, decode: Engine) -> str | None:
        names = prefill.name, decode.name
        return next((pair.path for pair in self.pairs if engines_of(pair) == names), None)

    def doubt(self, suspect: PairSuspect) -> None:
        names = suspect.local, suspect.peer
        self.pairs = [pair for pair in self.pairs if (pair.local, pair.peer) != names]
        if (decode := self._engines.get(suspect.local)) is not None:
            decode.proofs.pop(suspect.peer, None)

    def hold(self, engine: Engine, state: ListedState) -> None:
        """Withhold work from an engine until ``release`` or its restart."""
        self._held[engine.name] = (engine.processes, state)
        engine.ready, engine.state = False, state

    def release(self, engine: Engine) -> None:
        """Let the registry decide again whether an engine gets work."""
        if self._held.pop(engine.name, None) is not None:
            self.update(self.registry)

    def route(self, request: RoutingRequest) -> Route:
        now_at = self.clock()
        self.index.age()
        route = choose(request, list(self._engines.values()), self.index, now_at, self.policy)
        for engine in route.engines:
            self._num_picks += 1
            engine.last_pick = self._num_picks
            engine.health.asked(now_at)
        if route.prefill is not None and route.decode is not None:
            route.decode.health.pull(route.prefill.key).asked(now_at)
        return route

    def can_begin(self, request: RoutingRequest, reserved: set[EngineKey]) -> bool:
        """Return whether the engines to choose have room soon; else add them to ``reserved``, the
        engines that are kept for earlier prompts.
        """
        engines = list(self._engines.values())
        route = choose(request, engines, self.index, self.clock(), self.policy)
        if route.decode is None:
            return True  # the answer will be that no engine is ready
        first = route.prefill or route.decode
        is_full = route.prefill is not None and route.decode.num_unbegun >= MAX_UNBEGUN
        num_cached, _ = self.index.find(first, request.tokens)
        num_tokens = first.unbegun_tokens + max(1, request.num_prompt_tokens - num_cached)
        most = min(AHEAD_TOKENS, AHEAD_S * (first.tokens_per_s or math.inf))
        has_room = not first.unbegun_tokens or num_tokens <= most
        if has_room and not is_full and reserved.isdisjoint(one.key for one in route.engines):
            return True
        reserved.add(first.key)
        if is_full:
            reserved.add(route.decode.key)
        return False

    def pick_any(
        self, tried: Collection[EngineKey], can: Callable[[Engine], bool] = lambda _: True
    ) -> Engine | None:
        """Return an engine that was not ``tried``, for a call that computes nothing."""
        engines = self._engines.values()
        able = [each for each in engines if each.ready and each.key not in tried and can(each)]
        # Engines that fail requests come last.
        return min(
            able,
            key=lambda one: (one.health.is_tripped, one.num_works, one.last_pick),
            default=None,
        )

    def has_choice(self, num_tokens: int) -> bool:
        """Return whether cached prefixes can change the choice of engines or ranks for a prompt."""
        ready = (each.name for each in self._engines.values() if each.ready)
        return sum(map(self.index.num_ranks, ready)) > 1 and num_tokens >= self.index.least_tokens

    def pair_states(self) -> dict[tuple[str, str], HealthState]:
        names, now_at = {engine.key: engine.name for engine in self.engines}, self.clock()
        return {
            (names[key], engine.name): breaker.state(now_at)
            for engine in self.engines
            for key, breaker in engine.health.pulls.items()
            if key in names
        }

    def update(self, registry: Registry) -> None:
        """Apply a registry. Engines whose processes are the same keep their counts."""
        self.registry = registry
        ranks: dict[str, list[Entry]] = defaultdict(list)
        for entry in registry.entries:
            if entry.kind == "rank":
                ranks[entry.engine].append(entry)
        proofs: dict[str, dict[str, int]] = defaultdict(dict)
        for pair in registry.pairs:
            proofs[pair.local][pair.peer] = pair.peer_incarnation
        self._engines = {
            server.name: self._renew(server, ranks[server.name], proofs[server.name])
            for server in registry.entries
            if server.kind == "server"
        }
        keys = [engine.key for engine in self._engines.values()]
        for engine in self._engines.values():
            engine.health.keep(keys)
        self.pairs = registry.pairs

    def _renew(self, server: Entry, others: list[Entry], proofs: dict[str, int]) -> Engine:
        """Return the engine of an entry, as the same object if its processes still run."""
        others = sorted(others, key=lambda entry: entry.tp_rank)
        # A vLLM engine's processes on other hosts start and end with its server.
        ranks = [entry for entry in others if not entry.capabilities.is_vllm]
        name, ready = server.name, self._is_ready(server, ranks)
        processes = (server.incarnation, *(entry.incarnation for entry in ranks))
        engine = self._engines.get(name)
        if engine is None or engine.processes != processes or engine.url != server.address.http:
            engine = Engine(entry=server, processes=processes, ready=False, state="")
        engine.entry = server
        engine.state = "ready" if ready else _why_not_ready(server, ranks)
        if (held := self._held.get(name)) is not None:
            if held[0] == processes:
                ready, engine.state = False, held[1]
            else:
                del self._held[name]  # the engine was restarted
        # Once ready again, the engine counts as new: requests that it failed may use it again.
        engine.times_ready += ready and not engine.ready
        engine.ready = ready
        engine.devices = frozenset(
            device if device == "cpu" else f"{entry.host}/{device}"
            for entry in (server, *others)
            for device in entry.devices
        )
        engine.hosts = tuple(dict.fromkeys(e.host for e in (server, *others) if e.host))
        engine.proofs = proofs
        return engine

    def _is_ready(self, server: Entry, ranks: list[Entry]) -> bool:
        if ranks:
            self._with_ranks.add(server.name)
        if server.state != "ready" or server.withheld or not server.address.http:
            return False
        # Without native ranks, only the server must be ready; with them, all ranks must be, too.
        num_ready = sum(entry.state == "ready" for entry in ranks)
        is_whole = bool(ranks) and len(ranks) == num_ready == ranks[0].tp_size
        return is_whole or server.name not in self._with_ranks


def engines_of(pair: PairReady) -> tuple[str, str]:
    """Return the names of a pair's engines, prefill first. A rank's is ``ENGINE/rank-0``."""
    return pair.peer.partition("/")[0], pair.local.partition("/")[0]


def _why_not_ready(server: Entry, ranks: list[Entry]) -> ListedState:
    states = {entry.state for entry in (server, *ranks)}
    if "stalled" in states:
        return "stalled"
    if server.state in ("draining", "sleeping", "failed"):
        return server.state
    is_withheld = states == {"ready"} and server.withheld in ("draining", "leaving")
    return "draining" if is_withheld else "starting"
