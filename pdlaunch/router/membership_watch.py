"""Watches engines that somebody else started, and makes registries of what it sees.

::

    added ──> /health, /v1/models ──> canaries with the other role ──> ready ──> draining ──> gone
                    ▲                             │                      │
                    └── it does not answer, or was restarted ◀───────────┘

``watched_engine`` looks at each engine, ``pair_canaries`` proves pairs, ``membership_pairs`` judges
by both who may be used.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence

from pdlaunch.config.external import is_allowed
from pdlaunch.config.roles import EngineName, Role
from pdlaunch.errors import RequestError
from pdlaunch.http.watch.engine_api import EngineApi
from pdlaunch.protocol.control import PairSuspect, Registry
from pdlaunch.protocol.due_pairs import due_pairs
from pdlaunch.router.engine import Engine
from pdlaunch.router.handed_prompts import HandedPrompt
from pdlaunch.router.membership import AnnouncedMembership
from pdlaunch.router.membership_pairs import judge
from pdlaunch.router.pair_canaries import CanaryOutcome, PairCanaries
from pdlaunch.router.watched_engine import Member, WatchedEngine, WatchSettings

_logger = logging.getLogger(__name__)

LOOK_S = 0.25e-3
"""Time for each engine between two looks at all of them, which take about a tenth of that."""
DRAIN_POLL_S = 0.05


class WatchedMembership:
    """Is the Membership of engines that run already; belongs to the event loop.

    ``engines``: the router's own view of them, with its counts. ``report``: is told each canary's
    outcome, ``proven`` or ``failed``. ``recomputed``: is told of a prefill and a decode engine, and
    how many tokens the latter has computed though it was handed their KV blocks.
    """

    def __init__(
        self,
        settings: WatchSettings,
        engines: Callable[[], Iterable[Engine]],
        report: Callable[[CanaryOutcome], None] = lambda _: None,
        recomputed: Callable[[Engine, Engine, int], None] = lambda *_: None,
    ) -> None:
        self._settings = settings
        self._recomputed = recomputed
        self._engines = engines
        self._announced = AnnouncedMembership()
        self._watched: dict[str, WatchedEngine] = {}
        self._canaries = PairCanaries(
            settings,
            self._watched,
            spawn=self._spawn,
            report=report,
            on_result=self._publish_soon,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready: frozenset[str] = frozenset()
        self._serving = False
        self._registry = Registry(version=0, entries=[], serving=False)
        self._publishes: asyncio.TimerHandle | None = None
        self._published_at = 0.0

    @property
    def kind(self) -> EngineName:
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

    def holder(self, member: Member) -> str | None:
        """Return which engine has this one's name or URL, as one that drains still does."""
        return next(
            (
                name
                for name, other in self._watched.items()
                if name == member.name or other.member.url == member.url
            ),
            None,
        )

    def add(self, member: Member, source: str, *, is_trusted: bool = False) -> None:
        """Watch an engine from now on. ``is_trusted``: the configuration itself names its URL.

        Raises RequestError for one that may not be added.
        """
        try:
            is_allowed_here = is_trusted or is_allowed(member.url, self._settings.engine_urls)
        except ValueError as error:  # A name may stand for an address of one link: fe80::1%eth0.
            raise RequestError(str(error), param="url", code="invalid_engine") from None
        if not is_allowed_here:
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
        if (name := self.holder(member)) is not None:
            what = f"the name {name}" if name == member.name else f"the URL {member.url}"
            raise RequestError(
                f"engine {name} has {what} already; remove it first",
                param="name" if name == member.name else "url",
                status=409,
                code="engine_exists",
            )
        watched = WatchedEngine(member, source, self._settings, EngineApi(member.url, member.key))
        self._watched[member.name] = watched
        watched.task = self._spawn(self._watch(watched))
        _logger.info("added %s (%s) at %s", member.name, member.role, member.url)
        self._publish_soon()

    def set_drained(self, name: str, *, is_drained: bool) -> str:
        """Give an engine no new work, or work again; return the reason why not, empty: done."""
        watched = self._watched.get(name)
        if watched is None:
            return self._unknown(name)
        others = [engine for engine in self._engines() if engine.ready and engine.name != name]
        if is_drained and not watched.is_drained and not others:
            return f"{name} is not drained: no other engine serves"
        watched.is_drained = is_drained
        self._publish()
        return ""

    async def remove(self, name: str, drain_timeout_s: float) -> int:
        """Give an engine no more work, wait for what it does, and forget it.

        Returns how much it still did at the end. Raises RequestError when there is none.
        """
        watched = self._watched.get(name)
        if watched is None:
            raise RequestError(
                self._unknown(name), param="engine", status=404, code="engine_not_found"
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
            self._canaries.forget(name)
            self._publish()
            await watched.api.close()
            _logger.info("removed %s, with %d pieces of work running", name, num_works)
        return num_works

    def suspect(self, pair: PairSuspect) -> None:
        """Have a pair proven again that has served by decoding alone."""
        if self._canaries.doubt((pair.peer, pair.local)):
            self._publish()

    async def close(self) -> None:
        """End all watching."""
        if self._publishes is not None:
            self._publishes.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for watched in self._watched.values():
            await watched.api.close()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _unknown(self, name: str) -> str:
        there = ", ".join(sorted(self._watched)) or "none"
        return f"there is no engine {name[:100]}; there are: {there}"

    def _engine(self, name: str) -> Engine | None:
        return next((engine for engine in self._engines() if engine.name == name), None)

    def _num_works(self, name: str) -> int:
        engine = self._engine(name)
        return 0 if engine is None else engine.num_outstanding

    async def _watch(self, watched: WatchedEngine) -> None:
        while True:
            was_healthy, engine = watched.is_healthy, self._engine(watched.member.name)
            # Taken before the counts are asked for, which then have all of these.
            answered = () if engine is None else engine.handed.take_answered()
            await watched.look()
            if not watched.may_pair:
                self._canaries.forget(watched.member.name)
            elif was_healthy:
                self._doubt(watched)
                if engine is not None:
                    self._check_reads(watched, engine, answered)
            self._publish_soon()
            await asyncio.sleep(self._settings.poll_s)

    def _doubt(self, watched: WatchedEngine) -> None:
        """Have the pairs of an engine proven again that has failed requests since the last look.

        They are used meanwhile: most failures are a request's own.
        """
        engine = self._engine(watched.member.name)
        num_failures = 0 if engine is None else engine.breaker.num_failures
        if num_failures > watched.num_failures:
            self._canaries.doubt_engine(watched.member.name)
        watched.num_failures = num_failures

    def _check_reads(
        self, watched: WatchedEngine, engine: Engine, answered: Sequence[HandedPrompt]
    ) -> None:
        """Have pairs proven again whose decode engine does not get the blocks that it is handed."""
        counts = watched.counts
        if counts is None or watched.member.role != "decode":
            return
        if watched.failed_reads.look(counts):
            _logger.warning("%s: READs of KV blocks fail, and none comes through", engine.name)
            self._canaries.doubt_engine(engine.name)
        if watched.tells_recomputes or not watched.tells_sources:
            return
        if (found := engine.handed.judge(answered, counts)) is None:
            return
        for name in found.prefills:
            if (prefill := self._engine(name)) is not None:
                self._recomputed(prefill, engine, found.num_tokens)

    def _healthy(self, role: Role) -> list[str]:
        return [
            name
            for name, watched in self._watched.items()
            if watched.may_pair and not watched.is_draining and watched.member.role == role
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
        self._canaries.prove(due)
        verdict = judge(prefill, decode, self._canaries.results, self._ready)
        # Engines of both roles have no pair to prove.
        self._ready = verdict.ready.union(self._healthy("both"))
        self._serving = self._serving or self._can_serve(prefill, decode)
        peers: dict[str, list[str]] = defaultdict(list)
        for first, second in sorted(due):
            peers[first].append(second)
            peers[second].append(first)
        entries = [
            watched.entry(
                verdict.reasons.get(name, watched.reason),
                peers[name],
                is_ready=name in self._ready,
            )
            for name, watched in self._watched.items()
        ]
        pairs = list(self._canaries.proven())
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
