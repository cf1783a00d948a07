"""Which engine gets the next piece of work. Pure: told of the registry and of outcomes, asks
nobody.

The least outstanding work wins among the ready engines of the wanted role: prompt tokens for
prefill, active streams for decode. A role is a preference; an engine that failed a moment ago is
the last choice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import msgspec

from pdlaunch.protocol.control import Capabilities, Entry, ListedState, Registry, Role
from pdlaunch.protocol.ids import EngineId, LeaseId
from pdlaunch.protocol.kv_params import RemoteKV

BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0
MAX_DOUBLINGS = 10
"""Past the longest back-off, and no number that overflows, however often an engine fails in a
row.
"""

Processes = tuple[int, ...]
"""Incarnations of an engine's server and ranks."""
EngineKey = tuple[str, Processes, int]
"""Name, processes, how often these got ready: a restart makes it another engine, and so does its
return from sleep or a stall.
"""


class Lender(msgspec.Struct, frozen=True, kw_only=True):
    """Where the leases of an engine are found: at its rank 0."""

    engine_id: EngineId
    host: str
    port: int
    tp_size: int

    def remote_kv(self, lease_id: LeaseId) -> RemoteKV:
        """A lease that is not granted yet."""
        return RemoteKV(
            engine_id=self.engine_id,
            lease_id=lease_id,
            host=self.host,
            port=self.port,
            block_ids=[],
            num_tokens=0,
            tp_size=self.tp_size,
        )


class Engine(msgspec.Struct, kw_only=True, eq=False):
    """One engine as the router sees it; lives as long as its processes do."""

    name: str
    processes: Processes
    url: str
    role: Role | None
    capabilities: Capabilities
    ready: bool
    state: str
    """For people: ``ready``, or the ``ListedState`` that says why not."""
    reason: str = ""
    """Why it has ``failed``, and what comes next."""
    lender: Lender | None = None
    """None: it has no ranks of ours."""
    times_ready: int = 0
    max_model_len: int | None = None
    """Prompt plus output in tokens; None until the engine has been asked."""
    prompt_tokens: int = 0
    """Estimated tokens of the prompts it is working on."""
    num_streams: int = 0
    num_works: int = 0
    """Pieces of work that are outstanding."""
    num_picks: int = 0
    num_failures: int = 0
    """In a row."""
    avoid_until_s: float = 0.0

    @property
    def key(self) -> EngineKey:
        return (self.name, self.processes, self.times_ready)

    @contextlib.contextmanager
    def working(self, *, prompt_tokens: int = 0, num_streams: int = 0) -> Iterator[None]:
        """Count a piece of work as outstanding for as long as the block runs."""
        self.prompt_tokens += prompt_tokens
        self.num_streams += num_streams
        self.num_works += 1
        try:
            yield
        finally:
            self.prompt_tokens -= prompt_tokens
            self.num_streams -= num_streams
            self.num_works -= 1


class EnginePool:
    """All engines of the launch. ``clock`` counts seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._engines: dict[str, Engine] = {}
        self.serving = False
        """The supervisor has seen every process and every pair ready."""
        self._with_ranks: set[str] = set()

    @property
    def engines(self) -> list[Engine]:
        """By name."""
        return [self._engines[name] for name in sorted(self._engines)]

    def lists(self, engine: Engine) -> bool:
        """The registry says nothing of the engine's death, or of other processes in its place."""
        return self._engines.get(engine.name) is engine and engine.ready

    def update(self, registry: Registry) -> None:
        """Take over a registry; an engine whose processes are the same keeps its counts."""
        found: dict[str, Engine] = {}
        for server in registry.entries:
            if server.kind == "server":
                ranks = [
                    entry
                    for entry in registry.entries
                    if entry.kind == "rank" and entry.engine == server.name
                ]
                found[server.name] = self._renew(server, ranks)
        self._engines = found
        self.serving = registry.serving

    def has_ready(self, role: Role, *, needs: Callable[[Engine], bool] | None = None) -> bool:
        """Some engine of this role can be given work."""
        return any(
            engine.ready and engine.role == role and (needs is None or needs(engine))
            for engine in self._engines.values()
        )

    def max_model_len(self, role: Role) -> int | None:
        """The shortest of the role's engines, as far as they have told it."""
        return min(
            (
                engine.max_model_len
                for engine in self._engines.values()
                if engine.role == role and engine.max_model_len
            ),
            default=None,
        )

    def pick(
        self,
        role: Role,
        *,
        strict: bool = False,
        exclude: Collection[EngineKey] = (),
        needs: Callable[[Engine], bool] | None = None,
    ) -> Engine | None:
        """The engine for the next piece of work of ``role``; None when there is none.

        ``strict``: only of this role, and none that failed a moment ago.
        """
        now_s = self._clock()
        candidates = [
            engine
            for engine in self._engines.values()
            if engine.ready
            and engine.key not in exclude
            and (needs is None or needs(engine))
            and not (strict and (engine.role != role or engine.avoid_until_s > now_s))
        ]
        if not candidates:
            return None
        best = min(candidates, key=lambda engine: _rank(engine, role, now_s))
        best.num_picks += 1
        return best

    def failed(self, engine: Engine) -> None:
        """Avoid the engine for a while, twice as long after each failure in a row."""
        backoff_s = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** min(engine.num_failures, MAX_DOUBLINGS))
        engine.num_failures += 1
        engine.avoid_until_s = self._clock() + backoff_s

    def succeeded(self, engine: Engine) -> None:
        """The engine has answered."""
        engine.num_failures = 0
        engine.avoid_until_s = 0.0

    def _renew(self, server: Entry, ranks: list[Entry]) -> Engine:
        ready = self._is_ready(server, ranks)
        by_rank = sorted(ranks, key=lambda entry: entry.tp_rank)
        processes = (server.incarnation, *(entry.incarnation for entry in by_rank))
        engine = self._engines.get(server.name)
        if engine is None or engine.processes != processes or engine.url != server.address.http:
            engine = Engine(
                name=server.name,
                processes=processes,
                url=server.address.http,
                role=server.role,
                capabilities=server.capabilities,
                ready=False,
                state="",
            )
        engine.times_ready += ready and not engine.ready
        engine.ready = ready
        engine.role = server.role
        engine.lender = _find_lender(by_rank)
        engine.capabilities = server.capabilities
        engine.reason = server.reason
        engine.state = "ready" if ready else _why_not_ready(server, ranks)
        return engine

    def _is_ready(self, server: Entry, ranks: list[Entry]) -> bool:
        """An engine kind without ranks of ours is as ready as its server; one that has shown ranks
        needs all of them.
        """
        if ranks:
            self._with_ranks.add(server.name)
        if server.state != "ready" or not server.address.http:
            return False
        if server.name not in self._with_ranks:
            return True
        return (
            bool(ranks)
            and len(ranks) == ranks[0].tp_size
            and all(entry.state == "ready" for entry in ranks)
        )


def _find_lender(by_rank: list[Entry]) -> Lender | None:
    if not by_rank or not by_rank[0].engine_id:
        return None
    leader = by_rank[0]
    host, _, port = leader.address.side_channel.removeprefix("tcp://").rpartition(":")
    if not port.isdecimal():
        return None
    return (
        Lender(engine_id=leader.engine_id, host=host, port=int(port), tp_size=leader.tp_size)
        if host
        else None
    )


def _why_not_ready(server: Entry, ranks: list[Entry]) -> ListedState:
    if any(entry.state == "stalled" for entry in (server, *ranks)):
        return "stalled"
    return server.state if server.state in ("draining", "sleeping", "failed") else "starting"


def _rank(engine: Engine, role: Role, now_s: float) -> tuple[bool, bool, int, int, int]:
    """Smallest is best; engines of equal work take turns."""
    work = (
        (engine.prompt_tokens, engine.num_streams)
        if role == "prefill"
        else (engine.num_streams, engine.prompt_tokens)
    )
    return (engine.avoid_until_s > now_s, engine.role != role, *work, engine.num_picks)
