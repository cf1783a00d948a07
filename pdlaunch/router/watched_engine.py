"""Looks at one engine that somebody else started: whether it can be used, and what it can do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdlaunch import __version__
from pdlaunch.config.roles import EngineName, Role
from pdlaunch.errors import ProtocolError
from pdlaunch.http.watch.engine_api import Counts, EngineApi, FailedReads, with_version
from pdlaunch.protocol.control import (
    Address,
    Capabilities,
    Entry,
    ListedState,
    Withheld,
    why_withheld,
)
from pdlaunch.protocol.due_pairs import MAX_PEERS

POLL_S = 2.0
ASK_TIMEOUT_S = 10.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Member:
    """Names one engine to watch."""

    name: str
    role: Role
    url: str
    kind: EngineName
    key: str | None = field(default=None, repr=False)  # sent to this engine; None: it is sent none


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """Says what a router expects of its engines."""

    served_model_name: str
    kind: EngineName
    capabilities: Capabilities  # capabilities of engines of this kind and this version
    is_exact: bool = False  # a canary's tokens must be equal, as they are in float32
    poll_s: float = POLL_S


@dataclass(eq=False, slots=True)
class WatchedEngine:
    """Holds what is known of one engine, as of the last ``look``.

    Nothing of it is started, restarted or stopped. Like an engine of a launch, one that was
    restarted is listed as the next incarnation.
    """

    member: Member
    source: str  # ``config``, ``file`` or a name in DNS
    settings: WatchSettings
    api: EngineApi
    task: asyncio.Task[None] | None = None
    incarnation: int = 1
    is_healthy: bool = False
    has_been_healthy: bool = False
    is_leaving: bool = False  # it is about to be removed
    is_drained: bool = False  # it is given no new work until somebody says otherwise
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
            # Of a native engine of another version nothing is known.
            is_other = self.settings.kind == "native" and version != __version__
            known = Capabilities() if is_other else self.settings.capabilities
            self.capabilities = with_version(known, version)
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
