"""Makes registries of engines that were started elsewhere, for a router without a supervisor. They
are named by their URLs, or listed in ``engines_file``.

::

    added ──> /health, /v1/models ──> canaries with the other role ──> ready ──> draining ──> gone
                    ▲                             │                      │
                    └── it does not answer, or was restarted ◀───────────┘
"""

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pdlaunch import __version__
from pdlaunch.config.external import RunningEngine, RunningEngines, named
from pdlaunch.config.problems import InvalidConfigError
from pdlaunch.config.roles import Role
from pdlaunch.config.yaml_file import read_yaml
from pdlaunch.errors import ConfigError, ProtocolError, RequestError
from pdlaunch.http.canary import Canaries, CanaryDied, Proof, send_canary
from pdlaunch.http.engine_calls import Counts, EngineApi, FailedReads, with_version
from pdlaunch.protocol import control
from pdlaunch.router.engine import Engine
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import EnginePool

POLL_S = 2.0
ASK_TIMEOUT_S = 10.0
# Changes within this time, multiplied by the number of engines, are published together. To publish
# takes 0.04 ms for each engine, and each engine causes it every POLL_S.
GATHER_S = 0.25e-3
FILE = "file"
Results = Mapping[control.Pair, Proof | CanaryDied]

_logger = logging.getLogger(__name__)
_engines: TypeAdapter[tuple[RunningEngine, ...]] = TypeAdapter(RunningEngines)


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    role: Role
    url: str
    key: str | None = field(default=None, repr=False)  # the API key to send to this engine


@dataclass(frozen=True, slots=True)
class WatchSettings:
    served_model_name: str
    capabilities: control.Capabilities  # of engines of this kind
    is_exact: bool = False  # a canary's tokens must be equal, as they are in float32
    poll_s: float = POLL_S


@dataclass(eq=False, slots=True)
class WatchedEngine:
    """Holds the state of one engine at the last ``look``. Restarts count as new incarnations."""

    member: Member
    source: str  # ``config`` or FILE
    settings: WatchSettings
    api: EngineApi
    task: asyncio.Task[None] | None = None
    incarnation: int = 1
    is_healthy: bool = False
    has_been_healthy: bool = False
    is_lost: bool = False  # its last health check failed; its streams are given up
    is_leaving: bool = False  # it is being removed
    is_sleeping: bool = False
    reports_sleep: bool = False
    reason: str = "it has not been checked yet"
    started_at: float = 0.0
    capabilities: control.Capabilities = field(default_factory=control.Capabilities)
    counts: Counts | None = None
    num_failures: int = 0  # failures that the router had counted at the last look
    failed_reads: FailedReads = field(default_factory=FailedReads)
    # Held by a canary that reads the engine's counts: another canary's bytes would prove nothing.
    one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def may_pair(self) -> bool:
        return self.is_healthy and not self.is_sleeping

    async def look(self) -> None:
        try:
            trouble = await self._find_trouble()
        except ProtocolError as error:
            trouble = str(error)
        except Exception as error:
            # No answer of an engine may end its watch.
            _logger.exception("%s cannot be watched", self.member.name)
            trouble = f"{type(error).__name__}: {error}"
        if trouble:
            if self.is_healthy or self.reason != trouble:
                _logger.warning("%s: %s", self.member.name, trouble)
            self.is_healthy, self.reason = False, trouble
        elif not self.is_healthy:
            _logger.info("%s is healthy", self.member.name)
            # Count a new incarnation: the engine may have been restarted while it was unhealthy.
            self.incarnation += self.has_been_healthy
            self.is_healthy = self.has_been_healthy = True
            self.reason = ""

    async def _find_trouble(self) -> str:
        """Return why the engine cannot be used; empty if it can. Raises ProtocolError."""
        api, name = self.api, self.settings.served_model_name
        is_healthy = await api.is_healthy(ASK_TIMEOUT_S)
        self.is_lost = not is_healthy
        if not is_healthy:
            return f"/health does not answer{'' if is_healthy is None else ' with status 200'}"
        self.counts = await api.counts(ASK_TIMEOUT_S)
        before, self.started_at = self.started_at, self.counts.total("process_start_time_seconds")
        if self.is_healthy and before != self.started_at:
            return "it was restarted"
        if not self.is_healthy:
            models = await api.models(ASK_TIMEOUT_S)
            if name not in models:
                return f"it serves {', '.join(models) or 'no model'}, not {name}"
            version = await api.version(ASK_TIMEOUT_S)
            if not self.settings.capabilities.is_vllm and version != __version__:
                return f"it is pdlaunch {version}, but this router is {__version__}"
            self.capabilities = with_version(self.settings.capabilities, version)
            # An engine without sleep mode logs each such request, so ask it only once.
            self.reports_sleep = await api.is_sleeping(ASK_TIMEOUT_S) is not None
        if self.reports_sleep:
            self.is_sleeping = bool(await api.is_sleeping(ASK_TIMEOUT_S))
        return ""

    def has_trouble(self, num_failures: int) -> bool:
        """Return whether requests, as the router counts, or READs have failed since last time."""
        before, self.num_failures = self.num_failures, num_failures
        if self.member.role == "decode" and self.counts and self.failed_reads.look(self.counts):
            _logger.warning("%s: all READs of KV blocks fail", self.member.name)
            return True
        return num_failures > before

    def entry(self, reason: str, peers: Sequence[str], *, is_ready: bool) -> control.Entry:
        state: control.ListedState = "starting"
        if self.is_leaving or self.is_sleeping:
            state, reason = ("draining" if self.is_leaving else "sleeping"), ""
        elif is_ready:
            state, reason = "ready", ""
        elif self.is_lost and self.has_been_healthy:
            state = "stalled"
        return control.Entry(
            name=self.member.name,
            kind="server",
            incarnation=self.incarnation,
            engine=self.member.name,
            role=self.member.role,
            address=control.Address(http=self.member.url),
            capabilities=self.capabilities,
            state=state,
            reason=reason,
            # With fewer than control.MAX_PEERS, every engine of the other role is a peer.
            peers=tuple(peers) if len(peers) >= control.MAX_PEERS else None,
        )


def judge(
    prefill: Sequence[str], decode: Sequence[str], results: Results, ready_before: Collection[str]
) -> tuple[set[str], dict[str, str]]:
    """Return which healthy engines may be used, by the canaries of their due pairs, and for each
    other engine the reason.

    An engine with a proven pair is used. After a failed canary, decode is left out; prefill only if
    another prefill engine is proven with the same decode engine. So prefill of a single pair stays
    and serves alone. Engines of vLLM exchange blocks only over proven pairs, anyway.
    """
    due_of: dict[str, list[control.Pair]] = defaultdict(list)
    for pair in sorted(control.due_pairs(prefill, decode)):
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


@dataclass(eq=False)
class WatchedMembership:
    """Watches running engines; belongs to the event loop. ``announce`` gets each registry."""

    settings: WatchSettings
    _pool: EnginePool
    _metrics: RouterMetrics
    announce: Callable[[control.Registry], None] = lambda _: None

    def __post_init__(self) -> None:
        self._watched: dict[str, WatchedEngine] = {}
        self._canaries: Canaries[control.Pair] = Canaries(self._send_canary, self._report_canary)
        self._ready: set[str] = set()
        self._registry = control.Registry(version=0, entries=[], withheld="starting")
        self._publishes: asyncio.TimerHandle | None = None

    def key_of(self, engine: Engine) -> str | None:
        watched = self._watched.get(engine.name)
        # Compare the URL: a request to a replaced engine must not carry its successor's key.
        return watched.member.key if watched and watched.member.url == engine.url else None

    async def follow(self, path: Path, drain_timeout_s: float) -> None:
        """Poll ``engines_file`` until cancelled. While it is invalid, its engines do not change."""
        latest: list[Member] = []
        complaint = ""
        while True:
            try:
                engines = await asyncio.to_thread(read_engines_file, path)
                members = [to_member(engine, os.environ) for engine in engines]
                if members != latest:
                    latest = members
                    await self._set_members(members, drain_timeout_s)
                complaint = ""
            except (ConfigError, OSError) as error:
                if str(error) != complaint:
                    _logger.error("%s; the engines stay as they are", error)
                complaint = str(error)
            await asyncio.sleep(self.settings.poll_s)

    async def _set_members(self, members: Sequence[Member], drain_timeout_s: float) -> None:
        """Drain and remove the file's engines that are not in ``members``, and add new ones."""
        listed = [each for each in self._watched.values() if each.source == FILE]
        there = [each.member for each in listed if not each.is_leaving]
        gone = [member.name for member in there if member not in members]
        new = [member for member in members if member not in there]
        # A new engine waits for a removed one only if both have the same name or URL.
        waiting = [member for member in new if self._holder(member) is not None]

        def add(added: Sequence[Member]) -> None:
            for member in added:
                try:
                    self.add(member, FILE)
                except RequestError as error:
                    _logger.error("%s is left out: %s", member.name, error)

        add([member for member in new if member not in waiting])
        await asyncio.gather(*(self.remove(name, drain_timeout_s) for name in gone))
        add(waiting)

    def _holder(self, member: Member) -> str | None:
        known = [each.member for each in self._watched.values()]
        same = (one.name for one in known if one.name == member.name or one.url == member.url)
        return next(same, None)

    def add(self, member: Member, source: str) -> None:
        if (name := self._holder(member)) is not None:
            raise RequestError(f"engine {name} already has its name or URL")
        api = EngineApi(member.url, member.key)
        watched = self._watched[member.name] = WatchedEngine(member, source, self.settings, api)
        watched.task = asyncio.create_task(self._watch(watched))
        _logger.info("added %s (%s) at %s", member.name, member.role, member.url)
        self._publish_soon()

    async def remove(self, name: str, drain_timeout_s: float) -> None:
        watched = self._watched[name]
        watched.is_leaving = True
        self.publish()
        until_at = asyncio.get_running_loop().time() + drain_timeout_s
        num_works = await self._pool.until_idle(name, until_at)
        del self._watched[name]
        if watched.task is not None:
            watched.task.cancel()
        self._canaries.forget(self._pairs_of(name))
        self.publish()
        await watched.api.close()
        _logger.info("removed %s, with %d requests and leases left", name, num_works)

    def prove_again(self, pair: control.PairSuspect) -> None:
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

    def _pairs_of(self, name: str) -> list[control.Pair]:
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
                # Its pairs stay in use until the canaries end: most failures are a request's fault.
                self._canaries.doubt(self._pairs_of(name))
            self._publish_soon()
            await asyncio.sleep(self.settings.poll_s)

    async def _send_canary(self, pair: control.Pair) -> Proof:
        (prefill, decode), settings = (self._watched[name] for name in pair), self.settings
        model, is_exact = settings.served_model_name, settings.is_exact
        # Send one canary at a time: the bytes of another canary would prove nothing.
        async with decode.one_at_a_time:
            return await send_canary(prefill.api, decode.api, model, is_exact=is_exact)

    def _report_canary(self, pair: control.Pair, result: Proof | CanaryDied) -> None:
        has_failed = isinstance(result, CanaryDied)
        self._metrics.count("canaries", "failed" if has_failed else "proven")
        if isinstance(result, CanaryDied):
            _logger.warning("%s -> %s: %s", *pair, result)
        elif not result.is_reported:
            _logger.warning(
                "%s does not report which prompt tokens it computes, so recomputed prompts go "
                "unnoticed; start it with --enable-prompt-tokens-details",
                pair[1],
            )
        self._publish_soon()

    def _healthy(self, role: Role) -> list[str]:
        there = [each for each in self._watched.values() if each.may_pair and not each.is_leaving]
        return [each.member.name for each in there if each.member.role == role]

    def _publish_soon(self) -> None:
        """Publish in ``GATHER_S`` for each engine, to publish several changes at once."""
        if self._publishes is None:
            gather_s = GATHER_S * len(self._watched)
            self._publishes = asyncio.get_running_loop().call_later(gather_s, self.publish)

    def publish(self) -> None:
        """Send the canaries that are due, and announce the registry if it has changed."""
        if self._publishes is not None:
            self._publishes.cancel()
        self._publishes = None
        prefill, decode = self._healthy("prefill"), self._healthy("decode")
        due = control.due_pairs(prefill, decode)
        self._canaries.prove(due)
        ready, reasons = judge(prefill, decode, self._canaries.results, self._ready)
        # Engines of the role ``both`` have no pairs to prove.
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
        # With both roles, each needs a ready engine.
        roles = {watched.member.role for watched in self._watched.values()}
        needed = [prefill, decode] if roles == {"prefill", "decode"} else [self._ready]
        can_serve = not any(self._ready.isdisjoint(names) for names in needed)
        paths = {True: f"canary/{self.settings.capabilities.kind}", False: "canary, unchecked"}
        proven = [
            control.PairReady(
                local=decode_name,
                peer=name,
                peer_incarnation=self._watched[name].incarnation,
                path=paths[proof.is_reported],
                gigabytes_per_s=proof.gigabytes_per_s,
            )
            for (name, decode_name), proof in self._canaries.results.items()
            if isinstance(proof, Proof)
        ]
        now = self._registry
        withheld = "" if can_serve else now.withheld
        new = control.Registry(
            version=now.version, entries=entries, withheld=withheld, pairs=proven
        )
        if new != now or not now.version:
            new.version += 1
            self._registry = new
            self.announce(new)


def to_member(engine: RunningEngine, environ: Mapping[str, str]) -> Member:
    """Return the member to watch, with its key. Raises ConfigError if the variable is not set."""
    key = None
    if engine.api_key_env is not None and not (key := environ.get(engine.api_key_env)):
        raise ConfigError(
            f"the key of {engine.name} is missing: {engine.api_key_env} is not set, or empty",
            field="engines",
            value=engine.api_key_env,
            fix=f"set the variable {engine.api_key_env}, or leave api_key_env out",
        )
    assert engine.name is not None
    return Member(engine.name, engine.role, engine.url, key)


def read_engines_file(path: Path) -> list[RunningEngine]:
    """Return the engines that a file lists under ``engines``. Raises ConfigError."""
    # Messages show no values of the file: a value may be a secret in the wrong place.
    values, _, problems = read_yaml(path)
    if problems:
        raise InvalidConfigError(problems)
    try:
        if set(values) != {"engines"} or not isinstance(engines := values["engines"], list):
            raise ValueError("it must hold `engines: [{role, url, ...}]` and nothing else")
        return named(_engines.validate_python(tuple(engines)))
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        reason = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in details)
    except ValueError as error:
        reason = str(error)
    raise ConfigError(
        f"{path} cannot be used: {reason}",
        field="engines_file",
        value=str(path),
        fix="write `engines: [{role: prefill, url: http://HOST:PORT}]`",
    )
