"""Describes an engine as the router sees it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.observe.online_fit import OnlineFit
from pdlaunch.protocol.control import Capabilities
from pdlaunch.protocol.costs import EngineCosts, EngineReport
from pdlaunch.protocol.ids import EngineId, LeaseId
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.openai.responses import ModelCard
from pdlaunch.router.breaker import Breaker
from pdlaunch.router.handed_prompts import HandedPrompts
from pdlaunch.router.pace import NUM_GAPS, NUM_WHOLE, Pace

EXPERIENCE_DOUBT = (0.05, 0.5)
"""Assumed error of an estimate before the first request: 50 ms, and half of it."""
REPORT_LASTS_S = 1.0
"""Engines report with every step, so that this router hears several times a second of an engine
that works for it.
"""

SPEED_MEMORY_S = 2.0
"""Time constant of the average, in seconds in which an engine computes prompts."""

Processes = tuple[int, ...]
"""Incarnations of an engine's server and ranks."""
EngineKey = tuple[str, Processes, int]
"""Name, processes, and how often these got ready.

A restart makes it another engine, and so does its return from sleep or a stall.
"""


class Lender(msgspec.Struct, frozen=True, kw_only=True):
    """Tells where the leases of an engine are found: at its rank 0."""

    engine_id: EngineId
    host: str
    port: int
    tp_size: int

    def remote_kv(self, lease_id: LeaseId) -> RemoteKV:
        """Return the address of a lease that is not granted yet."""
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
    """Counts the load of one engine; lives as long as the engine's processes do."""

    name: str
    processes: Processes
    url: str
    host: str = ""
    """Name of its host; empty: not known."""
    role: Role | None
    capabilities: Capabilities
    ready: bool
    state: str
    """``ready``, or the ``ListedState`` that says why not; for people."""
    reason: str = ""
    """The reason why it has ``failed`` or is given no work, and what comes next."""
    lender: Lender | None = None
    """None: it has no ranks of ours."""
    times_ready: int = 0
    max_model_len: int | None = None
    """Prompt plus output in tokens; None until the engine has been asked."""
    models: list[ModelCard] = []
    """The models that it lists: the served one, and adapters."""
    num_prompt_tokens: int = 0
    """Estimated tokens of the prompts it is working on."""
    num_streams: int = 0
    num_works: int = 0
    """Pieces of work that are outstanding."""
    num_leases: int = 0
    """Prompts that it has computed here and whose KV blocks nobody has pulled yet."""
    report: EngineReport | None = None
    """The engine's latest report of its work."""
    reported_at: float = 0.0
    """Instants are on the pool's clock."""
    unanswered_tokens: int = 0
    """Tokens of prompts that were sent and of which no token has come yet."""
    progressed_at: float = 0.0
    """Instant since which the first of these are computed."""
    context_tokens: int = 0
    """Estimated tokens of the streams that this router has here."""
    num_expected: int = 0
    """Streams among them whose prompts are not computed yet, here or at a prefill engine."""
    expected_tokens: int = 0
    """Tokens of these prompts."""
    experience: OnlineFit = msgspec.field(
        default_factory=lambda: OnlineFit((0.0, 1.0), EXPERIENCE_DOUBT)
    )
    """Corrects estimates of the time to the first token: a constant, and a factor."""
    pace: Pace = msgspec.field(default_factory=Pace)
    """Its speed beside what was expected."""
    num_picks: int = 0
    devices: frozenset[str] = frozenset()
    """The GPUs of its ranks, as ``host/cuda:0``; empty on a CPU, or where nobody has told."""
    computed_tokens: float = 0.0
    computing_s: float = 0.0
    """Moving sums of the prompt tokens that it has computed, and of the time that took."""
    breaker: Breaker = msgspec.field(default_factory=Breaker)
    """Keeps requests off after failures."""
    pulls: dict[EngineKey, Breaker] = {}
    """The same for pulls from a prefill engine; one of which no pull has failed is not here."""
    handed: HandedPrompts = msgspec.field(default_factory=HandedPrompts)
    """Prompts whose KV blocks it was handed."""
    is_drained: bool = False
    """Somebody drains it: it is given no new work."""
    peers: frozenset[str] | None = None
    """The engines that it exchanges KV blocks with; None: all."""
    proofs: dict[str, int] = {}
    """Incarnations of the processes with which it has proven a path, by name."""

    @property
    def place(self) -> str:
        """Return its host's name, else the address in its URL; for people."""
        return self.host or urlsplit(self.url).hostname or ""

    @property
    def num_outstanding(self) -> int:
        """Return its pieces of work, and the prompts whose blocks are yet to be read from it."""
        return self.num_works + self.num_leases

    @property
    def key(self) -> EngineKey:
        return (self.name, self.processes, self.times_ready)

    def may_pull_from(self, prefill: Engine) -> bool:
        """Tell whether it may be handed KV blocks of ``prefill``."""
        if self.peers is not None and prefill.name not in self.peers:
            return False
        return (
            not self.capabilities.needs_proof
            or self.proofs.get(prefill.name) == prefill.processes[0]
        )

    @property
    def costs(self) -> EngineCosts | None:
        """Return what its work costs; None: it has not told."""
        return self.capabilities.costs if self.report is None else self.report.costs

    def hear(self, report: EngineReport, now_at: float) -> None:
        """Take what the engine says of its work."""
        self.report, self.reported_at = report, now_at

    def queued_tokens(self, now_at: float, seconds_per_token: float) -> float:
        """Return the prompt tokens that are to be computed before those of a new prompt.

        It is what this router has sent, or what the engine has told, which knows of other routers'
        prompts but not of what is on its way: the larger one, less what was computed since.
        """
        own = self.unanswered_tokens - (now_at - self.progressed_at) / seconds_per_token
        told = 0.0
        if self.report is not None:
            age_s = now_at - self.reported_at
            told = self.report.waiting_tokens - age_s / seconds_per_token
        return max(0.0, own, told)

    def streams(self, now_at: float) -> tuple[int, float]:
        """Return the streams that decode, and their tokens; what the engine has told counts for a
        while only, as nobody says when streams of other routers end.
        """
        num_own = self.num_streams - self.num_expected
        own_tokens = self.context_tokens - self.expected_tokens
        told = self.report
        if told is None or now_at - self.reported_at > REPORT_LASTS_S:
            return num_own, own_tokens
        return max(num_own, told.num_streams), max(own_tokens, told.context_tokens)

    @property
    def long_gaps(self) -> float:
        """Return how many gaps between tokens of its streams may be long."""
        return 0.0 if self.report is None else self.report.long_gaps

    def told(self, num_gaps: int, waited_s: float, now_at: float) -> None:
        """Note for how long the tokens of a stream were waited for, all but the first."""
        if num_gaps >= NUM_GAPS:
            costs = self.costs
            expected_s = 1.0 if costs is None else costs.steps.decode_s(*self.streams(now_at))
            self.pace.took("gap", waited_s / num_gaps, expected_s)

    def told_whole(self, num_tokens: int, took_s: float, now_at: float) -> None:
        """Note how long an answer took that came whole, behind a pull of its prompt."""
        if num_tokens >= NUM_WHOLE:
            self.told(num_tokens, took_s, now_at)

    @property
    def tokens_per_s(self) -> float:
        """Return the moving average of the prompt tokens it computes in a second; 0: not known."""
        return self.computed_tokens / self.computing_s if self.computing_s else 0.0

    def waiting_tokens(self, now_at: float, tokens_per_s: float) -> float:
        """Return how many prompt tokens it has to compute before those of a new prompt."""
        return max(0.0, self.unanswered_tokens - (now_at - self.progressed_at) * tokens_per_s)

    def computed(self, num_tokens: int, now_at: float) -> None:
        """Note that a prompt of which it had to compute so many tokens has its first token."""
        took_s = max(0.0, now_at - self.progressed_at)
        keeps = math.exp(-took_s / SPEED_MEMORY_S)
        self.computed_tokens = keeps * self.computed_tokens + num_tokens
        self.computing_s = keeps * self.computing_s + took_s
        self.progressed_at = now_at

    @contextlib.contextmanager
    def computing(self, num_tokens: int, clock: Callable[[], float]) -> Iterator[None]:
        """Count a prompt as unanswered for as long as the block runs."""
        if not self.unanswered_tokens:
            self.progressed_at = clock()
        self.unanswered_tokens += num_tokens
        try:
            yield
        finally:
            self.unanswered_tokens -= num_tokens
            self.progressed_at = clock()

    @contextlib.contextmanager
    def lending(self) -> Iterator[None]:
        """Count the KV blocks of a prompt as lent for as long as the block runs."""
        self.num_leases += 1
        try:
            yield
        finally:
            self.num_leases -= 1

    @contextlib.contextmanager
    def expecting(self, num_streams: int, num_prompt_tokens: int) -> Iterator[None]:
        """Count streams of a prompt as not begun for as long as the block runs."""
        self.num_expected += num_streams
        self.expected_tokens += num_streams * num_prompt_tokens
        try:
            yield
        finally:
            self.num_expected -= num_streams
            self.expected_tokens -= num_streams * num_prompt_tokens

    @contextlib.contextmanager
    def working(self, *, num_prompt_tokens: int = 0, num_streams: int = 0) -> Iterator[None]:
        """Count a piece of work as outstanding for as long as the block runs."""
        self.num_prompt_tokens += num_prompt_tokens
        self.num_streams += num_streams
        self.context_tokens += num_streams * num_prompt_tokens
        self.num_works += 1
        try:
            yield
        finally:
            self.num_prompt_tokens -= num_prompt_tokens
            self.num_streams -= num_streams
            self.context_tokens -= num_streams * num_prompt_tokens
            self.num_works -= 1
