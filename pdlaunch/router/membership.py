"""Makes registries of engines that somebody else started, for a router without a supervisor.

::

    added ──> /health, /v1/models ──> canaries with the other role ──> ready ──> draining ──> gone
                    ▲                             │                      │
                    └── it does not answer, or was restarted ◀───────────┘
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pdlaunch import __version__
from pdlaunch.config.roles import EngineName, Role
from pdlaunch.errors import ProtocolError, RequestError
from pdlaunch.http.watch.canary import Canaries, CanaryDied, Proof, send_canary
from pdlaunch.http.watch.engine_api import Counts, EngineApi, FailedReads, with_version
from pdlaunch.protocol.control import (
    Address,
    Capabilities,
    Entry,
    ListedState,
    PairReady,
    PairSuspect,
    Registry,
)
from pdlaunch.protocol.due_pairs import MAX_PEERS, Pair, due_pairs
from pdlaunch.router.engine import Engine
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import EnginePool

POLL_S = 2.0
ASK_TIMEOUT_S = 10.0
# For each engine: changes of so long are published together. A look at all engines takes 0.04 ms of
# the router for each, and each engine asks for one every POLL_S.
GATHER_S = 0.25e-3
Results = Mapping[Pair, Proof | CanaryDied]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Member:
    """Names one engine to watch."""

    name: str
    role: Role
    url: str
    key: str | None = field(default=None, repr=False)  # sent to this engine; None: it is sent none


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """Says what a router expects of its engines."""

    served_model_name: str
    kind: EngineName
    capabilities: Capabilities  # of engines of this kind
    is_exact: bool = False  # a canary's tokens must be equal, as they are in float32
    poll_s: float = POLL_S


@dataclass(eq=False, slots=True)
class WatchedEngine:
    """Holds what is known of one engine, as of the last ``look``.

    Nothing of it is started, restarted or stopped. Like an engine of a launch, one that was
    restarted is listed as the next incarnation.
    """

    member: Member
    source: str  # ``config`` or ``file``
    settings: WatchSettings
    api: EngineApi
    task: asyncio.Task[None] | None = None
    incarnation: int = 1
    is_healthy: bool = False
    has_been_healthy: bool = False
    is_lost: bool = False  # it did not say that it is healthy; streams that it has are given up
    is_leaving: bool = False  # it is about to be removed
    is_sleeping: bool = False
    tells_sleep: bool = False
    reason: str = "it has not been asked yet"
    started_at: float = 0.0
    capabilities: Capabilities = field(default_factory=Capabilities)
    counts: Counts | None = None
    num_failures: int = 0  # failures that the router had counted at the last look
    failed_reads: FailedReads = field(default_factory=FailedReads)
    # Held by the canary that reads its counts: the bytes of another one are no proof.
    one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def may_pair(self) -> bool:
        """Return whether it could exchange KV blocks now."""
        return self.is_healthy and not self.is_sleeping

    async def look(self) -> None:
        try:
            trouble = await self._find_trouble()
        except ProtocolError as error:
            trouble = str(error)
        except Exception as error:
            # Whatever an engine answers must not end its watch.
            _logger.exception("%s cannot be watched", self.member.name)
            trouble = f"{type(error).__name__}: {error}"
        if trouble:
            if self.is_healthy or self.reason != trouble:
                _logger.warning("%s: %s", self.member.name, trouble)
            self.is_healthy, self.reason = False, trouble
        elif not self.is_healthy:
            _logger.info("%s is healthy", self.member.name)
            # The next incarnation: nobody knows what it was in between.
            self.incarnation += self.has_been_healthy
            self.is_healthy = self.has_been_healthy = True
            self.reason = ""

    async def _find_trouble(self) -> str:
        """Return what keeps the engine from being used; empty: nothing. Raises ProtocolError."""
        api, name = self.api, self.settings.served_model_name
        is_healthy = await api.is_healthy(ASK_TIMEOUT_S)
        self.is_lost = not is_healthy
        if not is_healthy:
            return f"/health does not {'answer' if is_healthy is None else 'say 200'}"
        self.counts = await api.counts(ASK_TIMEOUT_S)
        before, self.started_at = self.started_at, self.counts.total("process_start_time_seconds")
        if self.is_healthy and before != self.started_at:
            return "it was restarted"
        if not self.is_healthy:
            models = await api.models(ASK_TIMEOUT_S)
            if name not in models:
                return f"it serves {', '.join(models) or 'no model'}, not {name}"
            version = await api.version(ASK_TIMEOUT_S)
            if self.settings.kind == "native" and version != __version__:
                return f"it is pdlaunch {version}, this router {__version__}"
            self.capabilities = with_version(self.settings.capabilities, version)
            # Each look would be a line more in the log of an engine that knows no sleep.
            self.tells_sleep = await api.is_sleeping(ASK_TIMEOUT_S) is not None
        if self.tells_sleep:
            self.is_sleeping = bool(await api.is_sleeping(ASK_TIMEOUT_S))
        return ""

    def has_trouble(self, num_failures: int) -> bool:
        """Return whether it has failed requests or READs since the last look.

        ``num_failures``: failures that the router has counted.
        """
        before, self.num_failures = self.num_failures, num_failures
        if self.member.role == "decode" and self.counts and self.failed_reads.look(self.counts):
            _logger.warning("%s: READs of KV blocks fail, and none comes through", self.member.name)
            return True
        return num_failures > before

    def entry(self, reason: str, peers: Sequence[str], *, is_ready: bool) -> Entry:
        """Return its entry in a registry; ``reason`` says why it is not ready."""
        state: ListedState = "starting"
        if self.is_leaving or self.is_sleeping:
            state, reason = ("draining" if self.is_leaving else "sleeping"), ""
        elif is_ready:
            state, reason = "ready", ""
        elif self.is_lost and self.has_been_healthy:
            state = "stalled"
        return Entry(
            name=self.member.name,
            kind="server",
            incarnation=self.incarnation,
            engine=self.member.name,
            role=self.member.role,
            address=Address(http=self.member.url),
            capabilities=self.capabilities,
            state=state,
            reason=reason,
            # Fewer than this many are all that there are.
            peers=tuple(peers) if len(peers) >= MAX_PEERS else None,
        )


def judge(
    prefill: Sequence[str], decode: Sequence[str], results: Results, ready_before: Collection[str]
) -> tuple[set[str], dict[str, str]]:
    """Judge healthy engines by the canaries of their due pairs.

    Return the engines that may be used, and the reasons against the others. An engine with a proven
    pair is used. Where canaries have failed, the decode engine is left out, and a prefill engine
    only if others have come through to the same decode engine: of a single pair, prefill stays and
    serves alone. Engines of vLLM exchange blocks over proven pairs alone, whatever is said here.
    """
    due_of: dict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(due_pairs(prefill, decode)):
        for name in pair:
            due_of[name].append(pair)
    proven = {name for pair, found in results.items() if isinstance(found, Proof) for name in pair}
    ready: set[str] = set()
    reasons: dict[str, str] = {}
    for name in (*prefill, *decode):
        failed = [
            pair
            for pair in due_of[name]
            if isinstance(results.get(pair), CanaryDied) and (name == pair[1] or pair[1] in proven)
        ]
        missing = [pair for pair in due_of[name] if pair not in results]
        if name in proven or not (failed or missing) or (name in ready_before and not failed):
            ready.add(name)
        elif failed:
            reasons[name] = f"{failed[0][0]} -> {failed[0][1]}: {results[failed[0]]}"
        else:
            (other,) = {*missing[0]} - {name}
            reasons[name] = f"its canary with {other} is due"
    return ready, reasons


class WatchedMembership:
    """Watches engines that run already; belongs to the event loop.

    ``pool``: the router's own view of them, with its counts. ``announce`` gets each registry.
    """

    def __init__(self, settings: WatchSettings, pool: EnginePool, metrics: RouterMetrics) -> None:
        self.settings = settings
        self.announce: Callable[[Registry], None] = lambda _: None
        self._pool = pool
        self._metrics = metrics
        self._watched: dict[str, WatchedEngine] = {}
        self._canaries: Canaries[Pair] = Canaries(self._send_canary, self._tell_canary)
        self._ready: set[str] = set()
        self._registry = Registry(version=0, entries=[], withheld="starting")
        self._publishes: asyncio.TimerHandle | None = None

    def key_of(self, engine: Engine) -> str | None:
        """Return the key that was given with the engine, None without one."""
        watched = self._watched.get(engine.name)
        # Compare the URL: a request to a replaced engine must not carry its successor's key.
        return watched.member.key if watched and watched.member.url == engine.url else None

    def members(self, source: str) -> dict[str, Member]:
        return {
            name: watched.member
            for name, watched in self._watched.items()
            if watched.source == source and not watched.is_leaving
        }

    def holder(self, member: Member) -> str | None:
        """Return which engine has this one's name or URL, as one that leaves still does."""
        for name, other in self._watched.items():
            if name == member.name or other.member.url == member.url:
                return name
        return None

    def add(self, member: Member, source: str) -> None:
        """Watch an engine from now on. Raises RequestError for one that may not be added."""
        if (name := self.holder(member)) is not None:
            raise RequestError(f"engine {name} has its name or URL")
        api = EngineApi(member.url, member.key)
        watched = self._watched[member.name] = WatchedEngine(member, source, self.settings, api)
        watched.task = asyncio.create_task(self._watch(watched))
        _logger.info("added %s (%s) at %s", member.name, member.role, member.url)
        self._publish_soon()

    async def remove(self, name: str, drain_timeout_s: float) -> None:
        """Give an engine no more work, wait for what it does, and forget it."""
        watched = self._watched[name]
        watched.is_leaving = True
        self.publish()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_timeout_s):
                await self._pool.until_idle(name)
        num_works = self._pool.num_outstanding(name)
        del self._watched[name]
        if watched.task is not None:
            watched.task.cancel()
        self._canaries.forget(self._pairs_of(name))
        self.publish()
        await watched.api.close()
        _logger.info("removed %s, with %d pieces of work running", name, num_works)

    def prove_again(self, pair: PairSuspect) -> None:
        """Have a pair proven again that has served by decoding alone."""
        if self._canaries.doubt([(pair.peer, pair.local)]):
            self.publish()

    async def close(self) -> None:
        if self._publishes is not None:
            self._publishes.cancel()
        tasks = [each.task for each in self._watched.values() if each.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._canaries.close()
        for watched in self._watched.values():
            await watched.api.close()

    def _pairs_of(self, name: str) -> list[Pair]:
        return [pair for pair in self._canaries.pairs() if name in pair]

    async def _watch(self, watched: WatchedEngine) -> None:
        name = watched.member.name
        while True:
            was_healthy = watched.is_healthy
            await watched.look()
            failures = (e.health.num_failures for e in self._pool.engines if e.name == name)
            if not watched.may_pair:
                self._canaries.forget(self._pairs_of(name))
            elif watched.has_trouble(next(failures, 0)) and was_healthy:
                # Its pairs are used meanwhile: most failures are a request's own.
                self._canaries.doubt(self._pairs_of(name))
            self._publish_soon()
            await asyncio.sleep(self.settings.poll_s)

    async def _send_canary(self, pair: Pair) -> Proof:
        (prefill, decode), settings = (self._watched[name] for name in pair), self.settings
        model, is_exact = settings.served_model_name, settings.is_exact
        # One at a time: the bytes of another canary are no proof.
        async with decode.one_at_a_time:
            return await send_canary(prefill.api, decode.api, model, is_exact=is_exact)

    def _tell_canary(self, pair: Pair, result: Proof | CanaryDied) -> None:
        if isinstance(result, CanaryDied):
            _logger.warning("%s -> %s: %s", *pair, result)
            self._metrics.count("canaries", "failed")
        else:
            self._metrics.count("canaries", "proven")
            if not result.is_told:
                _logger.warning(
                    "%s does not tell how much of a prompt it computes: where it computes what it "
                    "was handed, nobody sees it; start it with --enable-prompt-tokens-details",
                    pair[1],
                )
        self._publish_soon()

    def _healthy(self, role: Role) -> list[str]:
        return [
            name
            for name, watched in self._watched.items()
            if watched.may_pair and not watched.is_leaving and watched.member.role == role
        ]

    def _publish_soon(self) -> None:
        """Publish once for many changes: a look at all engines for each would be one too many."""
        if self._publishes is None:
            gather_s = GATHER_S * len(self._watched)
            self._publishes = asyncio.get_running_loop().call_later(gather_s, self.publish)

    def publish(self) -> None:
        """Send the canaries that are due, and announce what has changed."""
        if self._publishes is not None:
            self._publishes.cancel()
        self._publishes = None
        prefill, decode = self._healthy("prefill"), self._healthy("decode")
        due = due_pairs(prefill, decode)
        self._canaries.prove(due)
        ready, reasons = judge(prefill, decode, self._canaries.results, self._ready)
        # Engines of both roles have no pair to prove.
        self._ready = ready.union(self._healthy("both"))
        peers: dict[str, list[str]] = defaultdict(list)
        for first, second in sorted(due):
            peers[first].append(second)
            peers[second].append(first)
        entries = [
            watched.entry(
                reasons.get(name, watched.reason), peers[name], is_ready=name in self._ready
            )
            for name, watched in self._watched.items()
        ]
        now = self._registry
        new = Registry(
            version=now.version,
            entries=entries,
            withheld="" if self._can_serve(prefill, decode) else now.withheld,
            pairs=self._proven(),
        )
        if new != now or not now.version:
            new.version += 1
            self._registry = new
            self.announce(new)

    def _proven(self) -> list[PairReady]:
        paths = {True: f"canary/{self.settings.kind}", False: "canary, unchecked"}
        return [
            PairReady(
                local=decode,
                peer=prefill,
                peer_incarnation=self._watched[prefill].incarnation,
                seconds=proof.seconds,
                path=paths[proof.is_told],
                gigabytes_per_s=proof.gigabytes_per_s,
            )
            for (prefill, decode), proof in self._canaries.results.items()
            if isinstance(proof, Proof)
        ]

    def _can_serve(self, prefill: list[str], decode: list[str]) -> bool:
        """Return whether requests can be taken: where there are to be pairs, one must be proven."""
        roles = {watched.member.role for watched in self._watched.values()}
        if roles == {"prefill", "decode"}:
            return not self._ready.isdisjoint(prefill) and not self._ready.isdisjoint(decode)
        return bool(self._ready)
