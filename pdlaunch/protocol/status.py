"""Defines the answers of ``GET /pdlaunch/status`` on a deployment, and of ``/pdlaunch/requests`` on
the requests that it has served.

Shares and usages are from 0 to 1. Unknown values are null: engines of vLLM report fewer values. The
answers contain no text of prompts or answers, and no keys.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from pdlaunch.config.roles import Role
from pdlaunch.config.shared_settings import RoutingPolicy
from pdlaunch.observe.logs import escape_controls
from pdlaunch.observe.spans import Attribute
from pdlaunch.protocol.control import Withheld
from pdlaunch.protocol.ids import HttpRequestId

DeploymentState = Literal[Withheld, "ok", "unavailable"]
EventKind = Literal["engine", "launch", "pair"]
BottleneckKind = Literal["nothing", "unknown", "prefill", "decode", "kv_memory", "transfer"]


class Pulls(msgspec.Struct, frozen=True, kw_only=True):
    """The successful pulls of an engine, from all other engines or from one."""

    number: int = 0
    num_bytes: int = 0
    bytes_per_s: float = 0.0  # mean over the last ten seconds, including time without pulls
    gigabytes_per_s: float | None = None  # speed of recent pulls while they ran
    mean_s: float | None = None  # mean time of recent pulls; null without pulls


class EngineReading(msgspec.Struct, frozen=True, kw_only=True):
    age_s: float = 0.0
    running: int
    waiting: int
    kv_usage: float
    host_usage: float | None  # use of the host tier; null without a host tier
    cache: dict[str, float] | None  # tier -> share of prompt tokens; null without prompts
    pulls: Pulls
    failed_pulls: int
    refused_pulls: int  # pulls with wrong hashes or checksums; their blocks were not used


_HEALTH = {"open": "left out", "half_open": "on trial"}


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    role: str | None
    kind: str
    version: str
    url: str
    host: str  # the names of its hosts: ``node-1, node-2``; else the host of its URL
    state: str  # ``ready``, or why it gets no work
    is_down: bool  # True if it has died, hangs or has failed
    reason: str  # the reason why it has ``failed`` or gets no work, and what comes next
    # Circuit breaker. ``closed``: gets requests. ``open``: gets none for a while, after failures.
    # ``half_open``: gets a single trial request.
    health: str = "closed"
    left_out: str = ""  # the reason why it gets no new requests now; empty if it does
    load: int  # pieces of work that it has at present
    num_devices: int = 0  # GPUs, or 1 on a CPU; 0: not known
    max_running: int = 0  # largest batch; 0: not known
    computing: float = 0.0  # share of the last ten seconds in which it computed prompts
    waiting_prompt_tokens: float = 0.0  # prompt tokens that wait to be computed
    prompt_tokens_per_s: float = 0.0  # speed while it computes prompts; 0: not known
    reading: EngineReading | None = None  # null until its metrics have been read

    @property
    def shown_state(self) -> str:
        """Return its state for people: a ready engine may still be left out."""
        return _HEALTH.get(self.health, self.state) if self.state == "ready" else self.state


class GoneEngine(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that has left the registry in the last minutes: it died, or was removed."""

    name: str
    role: str | None
    gone_s: float


class PairStatus(msgspec.Struct, frozen=True, kw_only=True):
    prefill: str
    decode: str
    path: str
    gigabytes_per_s: float | None  # speed of the slowest ranks when the path was proven
    slow: str = ""  # by how much it is slower than its link should be, and why
    pulls: Pulls  # since the start of the decode engine
    last_failure: str  # empty without a failure
    # ``open``: no new pulls for a while, after failures. ``half_open``: one trial pull.
    health: str = "closed"

    @property
    def shown_gigabytes_per_s(self) -> float | None:
        """Return the speed that all views show: that of recent pulls, else that of the proof."""
        return self.pulls.gigabytes_per_s or self.gigabytes_per_s


class RouteShare(msgspec.Struct, frozen=True, kw_only=True):
    """The share of prompts with the same kind of route and the same reason for it."""

    kind: str  # ``pair``, or the role of the only engine
    reason: str
    share: float

    def __str__(self) -> str:
        return f"{self.share:.0%} {self.kind} ({self.reason})"


def route_shares(routes: Iterable[tuple[str, str]]) -> list[RouteShare]:
    """Return the share of each kind and reason, the largest first."""
    counts = Counter(routes)
    return [
        RouteShare(kind=kind, reason=reason, share=count / counts.total())
        for (kind, reason), count in counts.most_common()
    ]


class StatusEvent(msgspec.Struct, frozen=True, kw_only=True):
    at: float  # Unix time in seconds
    kind: EventKind
    name: str  # the engine or pair; empty: the launch
    text: str
    is_bad: bool


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Times in milliseconds, estimated from the buckets of a histogram."""

    p50: float
    p95: float


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of clients in a time span that ended ``at``."""

    at: float  # Unix time in seconds
    span_s: float
    requests_per_s: float
    errors_per_s: float  # refused and failed requests, unless the client left
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    first_token_ms: Percentiles | None  # null if no answer has begun
    inter_token_ms: Percentiles | None
    mean_inter_token_ms: float | None = None
    streams: float = 0.0  # mean number of running streams


class Bottleneck(msgspec.Struct, frozen=True, kw_only=True):
    kind: BottleneckKind
    why: str
    advice: str = ""  # a command and its effect; empty: no change is needed
    # Load of prefill engines by prompts, and of decode engines by tokens; above 1, queues grow
    prompts: float | None = None
    tokens: float | None = None
    engine: str = ""  # the engine that should take ``role``; empty: no engine should change
    role: Role | None = None


NOT_SAID = Bottleneck(kind="unknown", why="not measured yet")


class DeploymentStatus(msgspec.Struct, frozen=True, kw_only=True):
    at: float  # Unix time in seconds
    version: str
    model: str
    state: DeploymentState
    uptime_s: float
    in_flight: int  # prompts that are being answered
    requests: int  # finished answers since the router started
    errors: int
    engines: Sequence[EngineStatus]
    gone: Sequence[GoneEngine]
    pairs: Sequence[PairStatus]
    routes: Sequence[RouteShare]  # routes of the last 100 prompts
    rates: Rates  # figures of the last ten seconds
    # Figures of the two seconds with the fastest tokens since the router started; null: not known.
    fastest: Rates | None = None
    routing: RoutingPolicy = "load"
    queued_prompt_tokens: int = 0  # tokens of the prompts that wait at the router for an engine
    bottleneck: Bottleneck = NOT_SAID
    history: Sequence[Rates]  # the last five minutes, oldest first
    events: Sequence[StatusEvent]  # the last 100 events, oldest first


class RequestSummary(msgspec.Struct, kw_only=True):
    id: HttpRequestId
    received_at: float  # Unix time in seconds, on the router's clock
    status: int | None = None  # null while it runs; 499: the client left
    state: Literal["running", "done"] = "running"
    path: str
    model: str | None = None
    prefill: str | None = None  # engine that computed the prompt for ``decode``; null without pair
    decode: str | None = None  # engine that made the tokens (with ``prefill``, all but the first)
    route: str | None = None
    explanation: str | None = None
    kv_path: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None  # prompt tokens that were not computed, as in ``usage``
    cached_device_tokens: int | None = None
    cached_host_tokens: int | None = None
    remote_tokens: int | None = None  # prompt tokens whose blocks decode has pulled
    queue_ms: float | None = None
    prefill_ms: float | None = None
    pull_ms: float | None = None  # time from lease to proof
    pull_mb: float | None = None
    pull_gb_s: float | None = None
    verified: bool | None = None
    first_token_ms: float | None = None
    output_tokens: int | None = None
    ms_per_token: float | None = None
    total_ms: float | None = None
    retries: int = 0
    finish_reason: str | None = None
    error: str | None = None

    @property
    def line(self) -> str:
        """Return the known values of the request in one line, without its id and time."""
        apart = ("id", "received_at", "state", "status", "path", "prefill", "decode")
        values = {
            name: getattr(self, name)
            for name in RequestSummary.__struct_fields__
            if name not in apart
        }
        known = {name: str(value) for name, value in values.items() if value is not None}
        words = [f'{name}="{it}"' if " " in it else f"{name}={it}" for name, it in known.items()]
        first = [self.path] if self.status is None else [str(self.status), self.path]
        return escape_controls(" ".join([*first, *words]))


class SpanView(msgspec.Struct, kw_only=True):
    """A span, in milliseconds since the router received the request."""

    name: str
    process: str
    start_ms: float
    end_ms: float
    attributes: dict[str, Attribute] = {}
    parent: int = 0  # index of the parent span; 0: the request


class RequestTrace(RequestSummary, kw_only=True):
    spans: list[SpanView] = []
    dropped_spans: int = 0


class RequestList(msgspec.Struct, kw_only=True):
    requests: list[RequestSummary] = []
