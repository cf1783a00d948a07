"""Watches engines that somebody else started, and makes registries of what it sees.

::

    added ──> /health, /v1/models ──> canaries with the other role ──> ready ──> draining ──> gone
                    ▲                             │                      │
                    └── it does not answer, or was restarted ◀───────────┘

Nothing of an engine is started, restarted or stopped. Like an engine of a launch, one that was
restarted is listed as the next incarnation, and its pairs are proven again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pdlaunch import __version__
from pdlaunch.config.external import is_allowed
from pdlaunch.config.roles import Role
from pdlaunch.errors import ProtocolError, RequestError
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
from pdlaunch.router.membership import AnnouncedMembership
from pdlaunch.router.membership_pairs import judge
from pdlaunch.watch.canary import CanaryDied, Proof, send_canary
from pdlaunch.watch.engine_api import EngineApi, Kind
from pdlaunch.watch.versions import with_version

CanaryOutcome = Literal["proven", "failed"]

_logger = logging.getLogger(__name__)

POLL_S = 2.0
ASK_TIMEOUT_S = 10.0
LOOK_S = 0.25e-3
"""Time for each engine between two looks at all of them, which take about a tenth of that."""
NUM_CANARIES = 4
"""Canaries under way at a time."""
CANARY_RETRY_S = (0.5, 30.0)
"""First and longest pause before a canary that died is sent again."""
DRAIN_POLL_S = 0.05
_STARTED_AT = "process_start_time_seconds"


@dataclass(frozen=True, slots=True)
class Member:
    """Names one engine to watch."""

    name: str
    role: Role
    url: str
    kind: Kind
    key: str | None = field(default=None, repr=False)
    """Sent to this engine; None: it is sent none."""


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """Says what a router expects of its engines."""

    served_model_name: str
    kind: Kind
    capabilities: Capabilities
    """Capabilities of engines of this kind and this version."""
    is_exact: bool = False
    """A canary's tokens must be equal, as they are in float32."""
    engine_urls: tuple[str, ...] = ()
    """URLs at which engines may be that the configuration does not name."""
    poll_s: float = POLL_S


@dataclass(eq=False, slots=True)
class _Watched:
    """Holds what is known of one engine."""

    member: Member
    source: str
    api: EngineApi
    incarnation: int = 1
    is_healthy: bool = False
    has_been_healthy: bool = False
    is_draining: bool = False
    tells_sleep: bool = False
    is_sleeping: bool = False
    reason: str = "it has not been asked yet"
    started_at: float = 0.0
    capabilities: Capabilities = field(default_factory=Capabilities)
    num_failures: int = 0
    """Failures that the router had counted when it was looked at last."""
    task: asyncio.Task[None] | None = None
    one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the canary that reads its counts: the bytes of another one are no proof."""


class WatchedMembership:
    """Is the Membership of engines that run already; belongs to the event loop.

    ``engines``: the router's own view of them, with its counts. ``report``: is told each canary's
    outcome, ``proven`` or ``failed``.
    """

    def __init__(
        self,
        settings: WatchSettings,
        engines: Callable[[], Iterable[Engine]],
        report: Callable[[CanaryOutcome], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._engines = engines
        self._report = report
        self._announced = AnnouncedMembership()
        self._watched: dict[str, _Watched] = {}
        self._results: dict[Pair, Proof | str] = {}
        self._canaries: dict[Pair, asyncio.Task[None]] = {}
        self._at_once = asyncio.Semaphore(NUM_CANARIES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready: frozenset[str] = frozenset()
        self._serving = False
        self._registry = Registry(version=0, entries=[], serving=False)
        self._publishes: asyncio.TimerHandle | None = None
        self._published_at = 0.0

    @property
    def kind(self) -> Kind:
        """The kind of all its engines."""
        return self._settings.kind

    def begin(self) -> None:
        """Announce the first registry, which may have no engine yet."""
        self._announced.announce(self._registry)

    def versions(self) -> AsyncIterator[Registry]:
        return self._announced.versions()

    def key_of(self, engine: Engine) -> str | None:
        """Return the key that was given with the engine, None without one.

        By its URL too: a request to an engine that was replaced must not show the new one's key.
        """
        watched = self._watched.get(engine.name)
        return watched.member.key if watched and watched.member.url == engine.url else None

    def names(self, source: str) -> set[str]:
        """Return the names of the engines that came from ``source`` and stay."""
        return {
            name
            for name, watched in self._watched.items()
            if watched.source == source and not watched.is_draining
        }

    def member(self, name: str) -> Member | None:
        watched = self._watched.get(name)
        return None if watched is None else watched.member

    def add(self, member: Member, source: str, *, is_trusted: bool = False) -> None:
        """Watch an engine from now on. ``is_trusted``: the configuration itself names its URL.

        Raises RequestError for one that may not be added.
        """
        if not is_trusted and not is_allowed(member.url, self._settings.engine_urls):
            raise RequestError(
                f"engine_urls does not allow {member.url}; whoever started the router can add it "
                "there",
                param="url",
                status=403,
                code="url_not_allowed",
            )
        if member.kind != self._settings.kind:
            raise RequestError(
                f"{member.name} is {member.kind}, the others are {self._settings.kind}: they do "
                "not share KV blocks; give each kind a router of its own",
                param="kind",
                code="kinds_differ",
            )
        for name, other in self._watched.items():
            if name == member.name or other.member.url == member.url:
                what = f"the name {name}" if name == member.name else f"the URL {member.url}"
                raise RequestError(
                    f"engine {name} has {what} already; remove it first",
                    param="name" if name == member.name else "url",
                    status=409,
                    code="engine_exists",
                )
        watched = _Watched(member, source, EngineApi(member.url, member.key))
        self._watched[member.name] = watched
        watched.task = self._spawn(self._watch(watched))
        _logger.info("added %s (%s) at %s", member.name, member.role, member.url)
        self._publish_soon()

    async def remove(self, name: str, drain_timeout_s: float) -> int:
        """Give an engine no more work, wait for what it does, and forget it.

        Returns how much it still did at the end. Raises RequestError when there is none.
        """
        watched = self._watched.get(name)
        if watched is None:
            there = ", ".join(sorted(self._watched)) or "none"
            raise RequestError(
                f"there is no engine {name[:100]}; there are: {there}",
                param="engine",
                status=404,
                code="engine_not_found",
            )
        watched.is_draining = True
        self._publish()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_timeout_s):
                while self._num_works(name):  # noqa: ASYNC110 - counts tell nobody
                    await asyncio.sleep(DRAIN_POLL_S)
        num_works = self._num_works(name)
        # Two may ask for the same: the second finds it gone, or another of its name.
        if self._watched.get(name) is watched:
            del self._watched[name]
            if watched.task is not None:
                watched.task.cancel()
            self._forget_pairs(name)
            self._publish()
            await watched.api.close()
            _logger.info("removed %s, with %d pieces of work running", name, num_works)
        return num_works

    def suspect(self, pair: PairSuspect) -> None:
        """Have a pair proven again that has served by decoding alone."""
        if self._results.pop((pair.peer, pair.local), None) is not None:
            self._publish()

    async def close(self) -> None:
        """End all watching."""
        if self._publishes is not None:
            self._publishes.cancel()
        tasks = [*self._tasks, *self._canaries.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for watched in self._watched.values():
            await watched.api.close()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _engine(self, name: str) -> Engine | None:
        return next((engine for engine in self._engines() if engine.name == name), None)

    def _num_works(self, name: str) -> int:
        engine = self._engine(name)
        return 0 if engine is None else engine.num_works

    async def _watch(self, watched: _Watched) -> None:
        while True:
            try:
                trouble = await self._look(watched)
            except Exception as error:
                # Whatever an engine answers must not end its watch.
                _logger.exception("%s cannot be watched", watched.member.name)
                trouble = f"{type(error).__name__}: {error}"
            if trouble:
                if watched.is_healthy or watched.reason != trouble:
                    _logger.warning("%s: %s", watched.member.name, trouble)
                watched.is_healthy, watched.reason = False, trouble
                self._forget_pairs(watched.member.name)
            elif not watched.is_healthy:
                _logger.info("%s is healthy", watched.member.name)
                # The next incarnation: nobody knows what it was in between.
                watched.incarnation += watched.has_been_healthy
                watched.is_healthy = watched.has_been_healthy = True
                watched.reason = ""
            elif watched.is_sleeping:
                self._forget_pairs(watched.member.name)
            else:
                self._doubt(watched)
            self._publish_soon()
            await asyncio.sleep(self._settings.poll_s)

    async def _look(self, watched: _Watched) -> str:
        """Ask the engine how it is; return what keeps it from being used, empty: nothing."""
        api, name = watched.api, self._settings.served_model_name
        is_healthy = await api.is_healthy(ASK_TIMEOUT_S)
        if not is_healthy:
            return f"/health does not {'answer' if is_healthy is None else 'say 200'}"
        try:
            started_at = (await api.counts(ASK_TIMEOUT_S)).total(_STARTED_AT)
            if watched.is_healthy and started_at != watched.started_at:
                watched.started_at = started_at
                return "it was restarted"
            watched.started_at = started_at
            if not watched.is_healthy:
                models = await api.models(ASK_TIMEOUT_S)
                if name not in models:
                    return f"it serves {', '.join(models) or 'no model'}, not {name}"
                watched.capabilities = await self._capabilities(api)
                # Each look would be a line more in the log of an engine that knows no sleep.
                watched.tells_sleep = await api.is_sleeping(ASK_TIMEOUT_S) is not None
            if watched.tells_sleep:
                watched.is_sleeping = bool(await api.is_sleeping(ASK_TIMEOUT_S))
        except ProtocolError as error:
            return str(error)
        return ""

    async def _capabilities(self, api: EngineApi) -> Capabilities:
        """Return what the engine can do; of a native engine of another version, nothing is known.

        It does not tell a router that is not its launch's where its leases are (``awaits_lease``).
        """
        version = await api.version(ASK_TIMEOUT_S)
        if self._settings.kind == "native" and version != __version__:
            return Capabilities(version=version)
        return with_version(self._settings.capabilities, version)

    def _doubt(self, watched: _Watched) -> None:
        """Have the pairs of an engine proven again that has failed requests since the last look.

        They are used meanwhile: most failures are a request's own.
        """
        engine = self._engine(watched.member.name)
        num_failures = 0 if engine is None else engine.num_failures
        if num_failures > watched.num_failures:
            for pair in [pair for pair in self._results if watched.member.name in pair]:
                del self._results[pair]
        watched.num_failures = num_failures

    def _forget_pairs(self, name: str) -> None:
        for pair in [pair for pair in self._results if name in pair]:
            del self._results[pair]
        for pair in [pair for pair in self._canaries if name in pair]:
            self._canaries.pop(pair).cancel()

    def _healthy(self, role: Role) -> list[str]:
        return [
            name
            for name, watched in self._watched.items()
            if watched.is_healthy
            and not watched.is_draining
            and not watched.is_sleeping
            and watched.member.role == role
        ]

    def _publish_soon(self) -> None:
        """Publish once for many changes: a look at all engines for each would be one too many."""
        if self._publishes is None:
            loop = asyncio.get_running_loop()
            at = max(loop.time(), self._published_at + LOOK_S * len(self._watched))
            self._publishes = loop.call_at(at, self._publish)

    def _publish(self) -> None:
        """Send the canaries that are due, and announce what has changed."""
        if self._publishes is not None:
            self._publishes.cancel()
        self._publishes = None
        self._published_at = asyncio.get_running_loop().time()
        prefill, decode = self._healthy("prefill"), self._healthy("decode")
        due = due_pairs(prefill, decode)
        for pair in self._canaries.keys() - due:
            self._canaries.pop(pair).cancel()
        for pair in due - self._canaries.keys() - self._results.keys():
            self._canaries[pair] = self._spawn(self._prove(pair))
        verdict = judge(prefill, decode, self._results, self._ready)
        # Engines of both roles have no pair to prove.
        self._ready = verdict.ready.union(self._healthy("both"))
        self._serving = self._serving or self._can_serve(prefill, decode)
        peers: dict[str, list[str]] = defaultdict(list)
        for first, second in sorted(due):
            peers[first].append(second)
            peers[second].append(first)
        entries = [
            self._entry(watched, verdict.reasons.get(name, watched.reason), peers[name])
            for name, watched in self._watched.items()
        ]
        pairs = list(self._proven_pairs())
        now = self._registry
        if (entries, pairs, self._serving) != (now.entries, now.pairs, now.serving):
            self._registry = Registry(
                version=now.version + 1, entries=entries, serving=self._serving, pairs=pairs
            )
            self._announced.announce(self._registry)

    def _can_serve(self, prefill: list[str], decode: list[str]) -> bool:
        """Tell whether requests can be taken: where there are to be pairs, one must be proven."""
        roles = {watched.member.role for watched in self._watched.values()}
        if roles == {"prefill", "decode"}:
            return not self._ready.isdisjoint(prefill) and not self._ready.isdisjoint(decode)
        return bool(self._ready)

    def _entry(self, watched: _Watched, reason: str, peers: Sequence[str]) -> Entry:
        member = watched.member
        state: ListedState = "starting"
        if watched.is_draining:
            state, reason = "draining", ""
        elif watched.is_sleeping:
            state, reason = "sleeping", ""
        elif member.name in self._ready:
            state, reason = "ready", ""
        elif not watched.is_healthy and watched.has_been_healthy:
            state = "stalled"
        return Entry(
            name=member.name,
            kind="server",
            incarnation=watched.incarnation,
            engine=member.name,
            role=member.role,
            address=Address(http=member.url),
            capabilities=watched.capabilities,
            state=state,
            reason=reason,
            # Fewer than this many are all that there are.
            peers=tuple(peers) if len(peers) >= MAX_PEERS else None,
        )

    def _proven_pairs(self) -> Iterator[PairReady]:
        for (prefill, decode), proof in self._results.items():
            if isinstance(proof, Proof):
                yield PairReady(
                    local=decode,
                    peer=prefill,
                    peer_incarnation=self._watched[prefill].incarnation,
                    seconds=proof.seconds,
                    path=f"canary/{self._settings.kind}",
                    gigabytes_per_s=proof.gigabytes_per_s,
                )

    async def _prove(self, pair: Pair) -> None:
        """Send canaries through a pair until one comes through."""
        prefill, decode = (self._watched[name] for name in pair)
        pause_s, longest_s = CANARY_RETRY_S
        while True:
            result = await self._send_canary(prefill, decode)
            if isinstance(result, str):
                _logger.warning("%s -> %s: %s", *pair, result)
            self._report("failed" if isinstance(result, str) else "proven")
            self._results[pair] = result
            if isinstance(result, Proof):
                del self._canaries[pair]
            self._publish_soon()
            if isinstance(result, Proof):
                return
            await asyncio.sleep(pause_s)
            pause_s = min(longest_s, 2 * pause_s)

    async def _send_canary(self, prefill: _Watched, decode: _Watched) -> Proof | str:
        settings = self._settings
        try:
            async with decode.one_at_a_time, self._at_once:
                return await send_canary(
                    prefill.api,
                    decode.api,
                    settings.served_model_name,
                    is_exact=settings.is_exact,
                    kind=settings.kind,
                )
        except (CanaryDied, ProtocolError) as error:
            return str(error)
        except Exception as error:
            # Whatever an engine answers must not keep the pair from being tried again.
            _logger.exception("a canary cannot be sent")
            return f"{type(error).__name__}: {error}"
