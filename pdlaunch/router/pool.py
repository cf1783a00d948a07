"""Holds the engines of the deployment, as the registry and the outcomes of requests show them.

The pool does no I/O. A role is a preference: every engine can prefill and decode.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

from pdlaunch.config.roles import PAIR, Role
from pdlaunch.protocol.control import Entry, ListedState, PairReady, PairSuspect, Registry
from pdlaunch.protocol.process.bootstrap import RoutingLimits
from pdlaunch.router.engine import Engine, EngineKey, Processes
from pdlaunch.router.health import HealthState
from pdlaunch.router.policy import Need, Route, RoutingRequest, choose, covers
from pdlaunch.router.prefix_index import ServedPrefixes

IDLE_POLL_S = 0.05


class EnginePool:
    """Holds all engines of the launch. ``clock`` counts seconds."""

    def __init__(
        self,
        clock: Callable[[], float],
        limits: RoutingLimits | None = None,
        index: ServedPrefixes | None = None,
    ) -> None:
        self.clock = clock
        self._limits = limits or RoutingLimits()
        self._index = index or ServedPrefixes()
        self._engines: dict[str, Engine] = {}
        self.pairs: Sequence[PairReady] = ()
        """The paths that are proven now."""
        self.serving = False
        """The supervisor has seen every process and every pair ready."""
        self._registry = Registry(version=0, entries=[])
        self._held: dict[str, tuple[Processes, ListedState]] = {}
        """Engines without new work: their processes at the time, and the state to show."""
        self._with_ranks: set[str] = set()
        self._roles_seen: set[Role | None] = set()

    @property
    def engines(self) -> list[Engine]:
        return [self._engines[name] for name in sorted(self._engines)]

    def num_outstanding(self, name: str) -> int:
        engine = self._engines.get(name)
        return 0 if engine is None else engine.num_outstanding

    async def until_idle(self, name: str) -> None:
        while self.num_outstanding(name):  # noqa: ASYNC110 - counts tell nobody
            await asyncio.sleep(IDLE_POLL_S)

    def lists(self, engine: Engine) -> bool:
        """Return whether the registry still shows these very processes, ready."""
        return self._engines.get(engine.name) is engine and engine.ready

    @property
    def has_own_fields(self) -> bool:
        """Return whether engines know fields that the router does not. All are of one kind."""
        return any(engine.capabilities.has_own_fields for engine in self._engines.values())

    def may_hand_over(self, prefill: Engine, decode: Engine) -> bool:
        """Return whether ``decode`` may be given KV blocks of ``prefill`` as it is now."""
        is_there = (
            self.lists(prefill)
            or not decode.capabilities.needs_proof
            # It has computed the prompt, and stays until its blocks are read.
            or (self._engines.get(prefill.name) is prefill and prefill.state == "draining")
        )
        return is_there and decode.may_pull_from(prefill)

    def path(self, prefill: Engine, decode: Engine) -> str | None:
        """Return the path on which they exchange KV blocks; None: not known."""
        return next(
            (
                pair.path
                for pair in self.pairs
                if pair.peer.partition("/")[0] == prefill.name
                and pair.local.partition("/")[0] == decode.name
            ),
            None,
        )

    def doubt(self, suspect: PairSuspect) -> None:
        """Forget the proof of a pair until the registry has a new one."""
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
            self.update(self._registry)

    def update(self, registry: Registry) -> None:
        """Take over a registry; an engine whose processes are the same keeps its counts."""
        self._registry = registry
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
        # A sleeping engine forgets all blocks; a drained or stalled one does not.
        self._index.keep(
            name for name, engine in self._engines.items() if engine.state != "sleeping"
        )
        keys = [engine.key for engine in self._engines.values()]
        for engine in self._engines.values():
            engine.health.keep(keys)
        self._roles_seen.update(engine.role for engine in self._engines.values())
        self.pairs = registry.pairs
        self.serving = registry.serving

    def route(self, request: RoutingRequest) -> Route:
        now_at = self.clock()
        route = choose(request, list(self._engines.values()), self._index, now_at, self._limits)
        for engine in route.engines:
            engine.num_picks += 1
            engine.health.asked(now_at)
        if route.prefill is not None and route.decode is not None:
            route.decode.health.pull(route.prefill.key).asked(now_at)
        return route

    def pick_any(
        self, tried: Collection[EngineKey], can: Callable[[Engine], bool] = lambda _: True
    ) -> Engine | None:
        """Return an engine that was not ``tried``, for a call that computes nothing.

        Engines that fail requests come last.
        """
        able = [
            engine
            for engine in self._engines.values()
            if engine.ready and engine.key not in tried and can(engine)
        ]
        engine = min(
            able,
            key=lambda engine: (engine.health.is_tripped, engine.num_works, engine.num_picks),
            default=None,
        )
        if engine is not None:
            engine.num_picks += 1
        return engine

    def num_new_tokens(self, engine: Engine, request: RoutingRequest) -> int:
        """Return how many tokens of a prompt an engine will probably compute."""
        num_cached = self._index.num_cached_tokens(engine, request.prefix)
        return max(1, request.num_prompt_tokens - num_cached)

    def served(self, engine: Engine, request: RoutingRequest, num_output_tokens: int) -> None:
        """Note that an engine has the blocks of a prompt and its output."""
        self._index.served(engine, request.prefix, request.num_prompt_tokens, num_output_tokens)

    @property
    def has_pairs(self) -> bool:
        """Return whether the launch has, or had, prefill and decode engines."""
        return self._roles_seen.issuperset(PAIR)

    def has_ready(self, role: Role, needs: Collection[Need] = ()) -> bool:
        """Return whether some engine of this role can be given work."""
        return any(
            engine.ready and engine.role == role and covers(engine.capabilities, needs)
            for engine in self._engines.values()
        )

    def max_model_len(self, role: Role) -> int | None:
        return min(
            (
                engine.max_model_len
                for engine in self._engines.values()
                if engine.role == role and engine.max_model_len
            ),
            default=None,
        )

    def failed(self, engine: Engine) -> None:
        engine.health.failed(self.clock())

    def answers(self, engine: Engine) -> None:
        engine.health.answers(self.clock())

    def succeeded(self, engine: Engine) -> None:
        engine.health.succeeded(self.clock())

    def pulled(self, prefill: Engine, decode: Engine, *, ok: bool) -> None:
        decode.health.pulled(prefill.key, self.clock(), ok=ok)

    def pair_states(self) -> dict[tuple[str, str], HealthState]:
        """Return the states of the pairs of which a pull has failed lately, prefill first."""
        names, now_at = {engine.key: engine.name for engine in self.engines}, self.clock()
        return {
            (name, engine.name): engine.health.pull(key).state(now_at)
            for engine in self.engines
            if engine.health.pulls
            for key, name in names.items()
            if key in engine.health.pulls
        }

    def health_states(self) -> dict[str, HealthState]:
        now_at = self.clock()
        return {engine.name: engine.health.state(now_at) for engine in self.engines}

    def _renew(self, server: Entry, ranks: list[Entry], proofs: dict[str, int]) -> Engine:
        ready = self._is_ready(server, ranks)
        by_rank = sorted(ranks, key=lambda entry: entry.tp_rank)
        processes = (server.incarnation, *(entry.incarnation for entry in by_rank))
        engine = self._engines.get(server.name)
        if engine is None or engine.processes != processes or engine.url != server.address.http:
            engine = Engine(
                name=server.name,
                processes=processes,
                url=server.address.http,
                host=server.host,
                role=server.role,
                capabilities=server.capabilities,
                ready=False,
                state="",
            )
        incarnations, held_state = self._held.get(server.name, ((), None))
        if incarnations == processes and held_state is not None:
            ready = False
        else:
            held_state = None
            self._held.pop(server.name, None)
        # Once ready again it counts as a new engine: requests that it failed may ask again.
        engine.times_ready += ready and not engine.ready
        engine.ready = ready
        engine.role = server.role
        engine.devices = frozenset(
            device if device == "cpu" else f"{entry.host}/{device}"
            for entry in (server, *ranks)
            for device in entry.devices
        )
        engine.capabilities = server.capabilities
        engine.reason = server.reason
        engine.is_drained = server.withheld == "draining"
        engine.peers = None if server.peers is None else frozenset(server.peers)
        engine.proofs = proofs
        engine.state = held_state or ("ready" if ready else _why_not_ready(server, ranks))
        return engine

    def _is_ready(self, server: Entry, ranks: list[Entry]) -> bool:
        """Return whether the engine can be given work.

        Without native ranks an engine is as ready as its server; an engine that has shown ranks
        needs all of them.
        """
        if ranks:
            self._with_ranks.add(server.name)
        if server.state != "ready" or server.withheld or not server.address.http:
            return False
        if server.name not in self._with_ranks:
            return True
        return (
            bool(ranks)
            and len(ranks) == ranks[0].tp_size
            and all(entry.state == "ready" for entry in ranks)
        )


def _why_not_ready(server: Entry, ranks: list[Entry]) -> ListedState:
    if any(entry.state == "stalled" for entry in (server, *ranks)):
        return "stalled"
    if server.state in ("draining", "sleeping", "failed"):
        return server.state
    is_there = all(entry.state == "ready" for entry in (server, *ranks))
    return "draining" if is_there and server.withheld in ("draining", "leaving") else "starting"
