"""Looks at one engine that somebody else started: whether it can be used, and what it can do.

Nothing of it is started, restarted or stopped. Like an engine of a launch, one that was restarted
is listed as the next incarnation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdlaunch import __version__
from pdlaunch.config.roles import EngineName, Role
from pdlaunch.errors import ProtocolError
from pdlaunch.http.watch.engine_api import Counts, EngineApi, FailedReads, with_version
from pdlaunch.protocol.changes import Withheld, why_withheld
from pdlaunch.protocol.control import Address, Capabilities, Entry, ListedState
from pdlaunch.protocol.due_pairs import MAX_PEERS
from pdlaunch.router.handed_prompts import tells_sources

_logger = logging.getLogger(__name__)

POLL_S = 2.0
ASK_TIMEOUT_S = 10.0
_STARTED_AT = "process_start_time_seconds"


@dataclass(frozen=True, slots=True)
class Member:
    """Names one engine to watch."""

    name: str
    role: Role
    url: str
    kind: EngineName
    key: str | None = field(default=None, repr=False)
    """Sent to this engine; None: it is sent none."""


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """Says what a router expects of its engines."""

    served_model_name: str
    kind: EngineName
    capabilities: Capabilities
    """Capabilities of engines of this kind and this version."""
    is_exact: bool = False
    """A canary's tokens must be equal, as they are in float32."""
    engine_urls: tuple[str, ...] = ()
    """URLs at which engines may be that the configuration does not name."""
    poll_s: float = POLL_S


@dataclass(eq=False, slots=True)
class WatchedEngine:
    """Holds what is known of one engine, as of the last ``look``."""

    member: Member
    source: str
    """The source that added it: ``config``, ``file``, a name in DNS, or a command."""
    settings: WatchSettings
    api: EngineApi
    incarnation: int = 1
    is_healthy: bool = False
    has_been_healthy: bool = False
    is_draining: bool = False
    """It is about to be removed."""
    is_drained: bool = False
    """It is given no new work until somebody says otherwise."""
    tells_sleep: bool = False
    is_sleeping: bool = False
    reason: str = "it has not been asked yet"
    started_at: float = 0.0
    capabilities: Capabilities = field(default_factory=Capabilities)
    num_failures: int = 0
    """Failures that the router had counted when it was looked at last."""
    counts: Counts | None = None
    """Those of the last look that has read any."""
    failed_reads: FailedReads = field(default_factory=FailedReads)
    tells_recomputes: bool = True
    """Its answers say how much of a prompt it has computed, as far as its canaries have shown."""
    tells_sources: bool = False
    """Its counts say so of all prompts together."""
    task: asyncio.Task[None] | None = None
    one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the canary that reads its counts: the bytes of another one are no proof."""

    @property
    def may_pair(self) -> bool:
        """Tell whether it could exchange KV blocks now."""
        return self.is_healthy and not self.is_sleeping

    @property
    def is_checked(self) -> bool:
        """Tell whether it is found when it computes prompts whose KV blocks it was handed."""
        return self.tells_recomputes or self.tells_sources

    async def look(self) -> None:
        """Ask the engine how it is."""
        try:
            trouble = await self._find_trouble()
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

    def entry(self, reason: str, peers: Sequence[str], *, is_ready: bool) -> Entry:
        """Return its entry in a registry; ``reason`` says why it is not ready."""
        state: ListedState = "starting"
        if self.is_draining:
            state, reason = "draining", ""
        elif self.is_sleeping:
            state, reason = "sleeping", ""
        elif is_ready:
            state, reason = "ready", ""
        elif not self.is_healthy and self.has_been_healthy:
            state = "stalled"
        withheld: Withheld = "draining" if self.is_drained else ""
        return Entry(
            name=self.member.name,
            kind="server",
            incarnation=self.incarnation,
            engine=self.member.name,
            role=self.member.role,
            address=Address(http=self.member.url),
            capabilities=self.capabilities,
            state=state,
            reason=reason or why_withheld(withheld, self.member.name),
            # Fewer than this many are all that there are.
            peers=tuple(peers) if len(peers) >= MAX_PEERS else None,
            withheld=withheld,
        )

    async def _find_trouble(self) -> str:
        """Return what keeps the engine from being used; empty: nothing."""
        api, name = self.api, self.settings.served_model_name
        is_healthy = await api.is_healthy(ASK_TIMEOUT_S)
        if not is_healthy:
            return f"/health does not {'answer' if is_healthy is None else 'say 200'}"
        try:
            self.counts = await api.counts(ASK_TIMEOUT_S)
            self.tells_sources = tells_sources(self.counts)
            started_at = self.counts.total(_STARTED_AT)
            if self.is_healthy and started_at != self.started_at:
                self.started_at = started_at
                return "it was restarted"
            self.started_at = started_at
            if not self.is_healthy:
                models = await api.models(ASK_TIMEOUT_S)
                if name not in models:
                    return f"it serves {', '.join(models) or 'no model'}, not {name}"
                self.capabilities = await self._find_capabilities()
                # Each look would be a line more in the log of an engine that knows no sleep.
                self.tells_sleep = await api.is_sleeping(ASK_TIMEOUT_S) is not None
            if self.tells_sleep:
                self.is_sleeping = bool(await api.is_sleeping(ASK_TIMEOUT_S))
        except ProtocolError as error:
            return str(error)
        return ""

    async def _find_capabilities(self) -> Capabilities:
        """Return what the engine can do; of a native engine of another version, nothing is known.

        It does not tell a router that is not its launch's where its leases are (``awaits_lease``).
        """
        version = await self.api.version(ASK_TIMEOUT_S)
        if self.settings.kind == "native" and version != __version__:
            return Capabilities(version=version)
        return with_version(self.settings.capabilities, version)
