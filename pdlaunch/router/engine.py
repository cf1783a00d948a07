"""Holds the router's view of an engine, and counts the router's work there.

A circuit breaker decides by the results of recent requests whether an engine gets more::

    closed ── a request failed ──▶ open ── time is over ──────▶ half-open
      ▲                             ▲                               │ one try at a time
      └───────── success ◀──────────┴── failure: twice as long ◀────┘
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.http.limits import Interrupts
from pdlaunch.protocol.control import Capabilities, Entry
from pdlaunch.protocol.openai.responses import ModelCard

HealthState = Literal["closed", "open", "half_open"]
Processes = tuple[int, ...]  # incarnations of an engine's server and ranks
# Name, processes, and how often these became ready. After a restart, sleep or stall, the key is new
# and requests that the engine has failed may use it again.
EngineKey = tuple[str, Processes, int]

# Limit of requests that name a data parallel rank, in even shares; vLLM places the others.
# If 16 requests name two ranks at random, a rank gets more than 12 in only 2 % of the cases.
RANK_SHARE = 1.5
SPEED_MEMORY_S = 2.0  # time constant of an engine's speed, in seconds in which it computes prompts
OPEN_S = 1.0
MAX_OPEN_S = 30.0
_MAX_DOUBLINGS = 10
TRY_LASTS_S = 5.0  # a try without an answer for this long does not block the next one
# Failures are forgotten after this many successes in a row, so that an engine that fails one
# request in eight stays open longer and longer.
NUM_GOOD = 8


class Breaker(msgspec.Struct, kw_only=True):
    """Counts the results of an engine's requests, or of a pair's pulls. Times: the pool's clock."""

    # Failures since the last ``NUM_GOOD`` successes in a row; simultaneous ones count as one.
    num_failures: int = 0
    num_successes: int = 0  # successes in a row
    is_tripped: bool = False  # not closed
    open_until_at: float = 0.0
    tried_until_at: float = 0.0

    def state(self, now_at: float) -> HealthState:
        if not self.is_tripped:
            return "closed"
        return "open" if now_at < self.open_until_at else "half_open"

    def takes(self, now_at: float) -> bool:
        return not self.is_tripped or self.wants_try(now_at)

    def wants_try(self, now_at: float) -> bool:
        return self.is_tripped and now_at >= max(self.open_until_at, self.tried_until_at)

    def asked(self, now_at: float) -> None:
        if self.wants_try(now_at):
            self.tried_until_at = now_at + TRY_LASTS_S

    def failed(self, now_at: float) -> None:
        self.num_successes = 0
        # While the breaker is open, only requests sent earlier can fail; ignore them.
        if self.state(now_at) == "open":
            return
        open_s = min(MAX_OPEN_S, OPEN_S * 2 ** min(self.num_failures, _MAX_DOUBLINGS))
        self.num_failures += 1
        self.is_tripped, self.open_until_at, self.tried_until_at = True, now_at + open_s, 0.0

    def answers(self, now_at: float) -> None:
        """Record a first token. It closes an open breaker only after a single failure."""
        # That was probably the failed request's own fault. While open, the token is of an earlier
        # request.
        if self.num_failures <= 1 or now_at >= self.open_until_at:
            self.is_tripped = False

    def succeeded(self, now_at: float) -> None:
        self.answers(now_at)
        self.num_successes += 1
        if self.num_successes >= NUM_GOOD:
            self.num_failures = 0

    def why(self, now_at: float) -> str:
        """Say why no requests are sent; empty if they are sent."""
        if self.takes(now_at):
            return ""
        if now_at >= self.open_until_at:
            return "half-open, being tried"
        left_s = self.open_until_at - now_at
        return f"open after {self.num_failures} failures, tried again in {left_s:.1f} s"


class EngineHealth(Breaker, kw_only=True):
    """Counts the requests of an engine, and its pulls from each prefill engine."""

    # By the key of the prefill engine; only engines with a failed pull are here.
    pulls: dict[object, Breaker] = {}

    def pull(self, prefill: object) -> Breaker:
        return self.pulls.get(prefill) or _WELL

    def pulled(self, prefill: object, now_at: float, *, ok: bool) -> None:
        if not ok:
            self.pulls.setdefault(prefill, Breaker()).failed(now_at)
        elif (breaker := self.pulls.get(prefill)) is not None:
            breaker.succeeded(now_at)
            if not breaker.num_failures:
                del self.pulls[prefill]

    def keep(self, prefills: Iterable[object]) -> None:
        if self.pulls:
            self.pulls = {key: self.pulls[key] for key in prefills if key in self.pulls}


_WELL = Breaker()  # shared default; only read, never changed


class Engine(msgspec.Struct, kw_only=True, eq=False):
    """Counts the load of one engine; lives as long as the engine's processes do."""

    entry: Entry  # its server's entry in the latest registry
    processes: Processes
    ready: bool
    state: str  # ``ready``, or the ``ListedState`` for people that says why not
    times_ready: int = 0
    devices: frozenset[str] = frozenset()  # such as ``host/cuda:0``, or ``cpu``; empty: unknown
    hosts: tuple[str, ...] = ()  # names of its hosts, as far as they are known
    max_model_len: int | None = None  # prompt plus output in tokens; None: unknown
    models: list[ModelCard] = []  # the models that it lists: the served model, and adapters
    # Incarnations of the peers to which a path of this engine is proven, by the peer's name.
    proofs: dict[str, int] = {}
    health: EngineHealth = msgspec.field(default_factory=EngineHealth)
    calls: Interrupts = msgspec.field(default_factory=Interrupts)  # the running calls to it
    last_pick: int = 0  # number of the latest request that was routed to it
    num_works: int = 0  # running pieces of work, such as a prefill or an answer
    # Running pieces of work for each data parallel rank that they name; None: vLLM chooses
    named: Counter[int | None] = msgspec.field(default_factory=Counter)
    num_leases: int = 0  # computed prompts whose KV blocks have not been pulled yet
    num_streams: int = 0  # choices that have begun
    # Pieces of work without a first token, and their uncached tokens. Whole answers of vLLM are not
    # counted, because the router cannot see when their first token is computed.
    num_unbegun: int = 0
    unbegun_tokens: int = 0
    kv_tokens: int = 0  # estimated tokens that its streams hold, or will hold, in the KV cache
    unanswered_tokens: int = 0  # uncached tokens of prompts without an output token
    progressed_at: float = 0.0  # when it began with the first of them, or last computed a prompt
    # Moving sums of the prompt tokens that it has computed, and of the seconds that this took.
    computed_tokens: float = 0.0
    computing_s: float = 0.0
    computed_s: float = 0.0  # total time with prompts to compute, up to ``progressed_at``

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def role(self) -> Role | None:
        return self.entry.role

    @property
    def capabilities(self) -> Capabilities:
        return self.entry.capabilities

    @property
    def url(self) -> str:
        return self.entry.address.http

    @property
    def kv_events(self) -> str:
        """Return the base URL of its KV events; empty: it has none."""
        # A native server streams the events itself. For vLLM, the sidecar streams them.
        return self.entry.address.kv_events or ("" if self.capabilities.is_vllm else self.url)

    @property
    def place(self) -> str:
        return ", ".join(self.hosts) or urlsplit(self.url).hostname or ""

    @property
    def num_outstanding(self) -> int:
        return self.num_works + self.num_leases

    @property
    def key(self) -> EngineKey:
        return (self.name, self.processes, self.times_ready)

    def may_pull_from(self, prefill: Engine) -> bool:
        peers = self.entry.peers
        if peers is not None and prefill.name not in peers:
            return False
        is_proven = self.proofs.get(prefill.name) == prefill.processes[0]
        return is_proven or not self.capabilities.is_vllm

    @property
    def tokens_per_s(self) -> float:
        """Return the moving average of computed prompt tokens per second; 0: unknown."""
        return self.computed_tokens / self.computing_s if self.computing_s else 0.0

    def waiting_tokens(self, now_at: float, tokens_per_s: float) -> float:
        """Return how many prompt tokens it has to compute before it can begin a new prompt."""
        return max(0.0, self.unanswered_tokens - (now_at - self.progressed_at) * tokens_per_s)

    def computing_since_start_s(self, now_at: float) -> float:
        return self.computed_s + (now_at - self.progressed_at if self.unanswered_tokens else 0.0)

    def may_name(self, dp_rank: int, num_ranks: int) -> bool:
        return self.named[dp_rank] < math.ceil(RANK_SHARE * (self.num_works + 1) / num_ranks)

    @contextlib.contextmanager
    def holding(self, num_tokens: int) -> Iterator[None]:
        self.kv_tokens += num_tokens
        try:
            yield
        finally:
            self.kv_tokens -= num_tokens

    @contextlib.contextmanager
    def working(
        self,
        clock: Callable[[], float],
        *,
        num_prompt_tokens: int,
        num_uncached: int = 0,
        num_streams: int = 0,
        dp_rank: int | None = None,
        reports_begin: bool = True,
        moved: Callable[[], None] = lambda: None,
    ) -> Iterator[Callable[[], None]]:
        """Count a piece of work while the block runs; yield a function for its first token.

        ``num_uncached``: prompt tokens to compute before the first token. ``num_streams``: choices
        that are streamed afterwards. ``dp_rank``: the rank that the request names. With
        ``reports_begin``, the caller will call the function. ``moved`` is called when the engine
        may have room for another prompt.
        """
        has_begun = False

        def count(sign: int) -> None:
            self.unanswered_tokens += sign * num_uncached
            if reports_begin:
                self.num_unbegun += sign
                self.unbegun_tokens += sign * num_uncached

        def begin() -> None:
            nonlocal has_begun
            if has_begun:
                return
            has_begun = True
            self.num_streams += num_streams
            count(-1)
            if num_uncached:
                self._progress(num_uncached, clock())
            moved()

        self.num_works += 1
        self.named[dp_rank] += 1
        # The clock starts with the first waiting prompt: idle time does not count.
        if num_uncached and not self.unanswered_tokens:
            self.progressed_at = clock()
        count(1)
        try:
            with self.holding(num_streams * num_prompt_tokens):
                yield begin
        finally:
            self.num_works -= 1
            self.named[dp_rank] -= 1
            if has_begun:
                self.num_streams -= num_streams
            else:
                count(-1)
                if num_uncached:
                    self._progress(0, clock())
            moved()

    def _progress(self, num_tokens: int, now_at: float) -> None:
        """Record computed prompt tokens; 0: work ended without any, which tells no speed."""
        took_s = max(0.0, now_at - self.progressed_at)
        self.computed_s += took_s
        self.progressed_at = now_at
        if num_tokens:
            keeps = math.exp(-took_s / SPEED_MEMORY_S)
            self.computed_tokens = keeps * self.computed_tokens + num_tokens
            self.computing_s = keeps * self.computing_s + took_s
