"""Defines what ``GET /pdlaunch/status`` says of a deployment, and ``/pdlaunch/requests`` of the
requests that it has served.

Shares and usages go from 0 to 1, null stands for what is not known: engines that are not ours tell
less of themselves. No text of a prompt or of an answer is in it, and no key.
"""

from __future__ import annotations

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
    """Counts the pulls of an engine that ended well, from all others or from one."""

    number: int = 0
    num_bytes: int = 0
    bytes_per_s: float = 0.0  # mean of the last ten seconds, whether pulls ran or not
    gigabytes_per_s: float | None = None  # speed of the last seconds' pulls while they ran
    mean_s: float | None = None  # mean time of a pull in the last seconds; null without pulls


class EngineReading(msgspec.Struct, frozen=True, kw_only=True):
    age_s: float = 0.0
    running: int
    waiting: int
    kv_usage: float
    host_usage: float | None  # use of the host tier; null without one
    cache: dict[str, float] | None  # shares of prompt tokens by tier; null without prompts
    pulls: Pulls
    failed_pulls: int
    refused_pulls: int  # pulls whose hashes or checksums differed; nothing of them was used


_HEALTH = {"open": "left out", "half_open": "on trial"}


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    role: str | None
    kind: str
    version: str
    url: str
    host: str  # the names of its hosts: ``node-1, node-2``; else the host of its URL
    state: str  # ``ready``, or why it is given no work
    is_down: bool  # it has died, hangs or failed: it would work if it could
    reason: str  # the reason why it has ``failed`` or is given no work, and what comes next
    # ``closed``: gets requests. ``open``: has failed some and gets none for a while.
    # ``half_open``: gets a single trial request.
    health: str = "closed"
    left_out: str = ""  # the reason why it gets nothing new now; empty when it does
    load: int  # pieces of work that it has been given and not ended
    num_devices: int = 0  # GPUs, or 1 on a CPU; 0: not known
    max_running: int = 0  # largest batch; 0: not known
    computing: float = 0.0  # share of the last ten seconds in which it computed prompts
    waiting_prompt_tokens: float = 0.0  # tokens still to compute
    prompt_tokens_per_s: float = 0.0  # while it computes; 0: not known
    reading: EngineReading | None = None  # null until its metrics have been read

    @property
    def shown_state(self) -> str:
        """Return its state in a word or two: one that is ready may still be left out."""
        return _HEALTH.get(self.health, self.state) if self.state == "ready" else self.state


class GoneEngine(msgspec.Struct, frozen=True, kw_only=True):
    """Names an engine that has left the registry in the last minutes: it died, or was removed."""

    name: str
    role: str | None
    gone_s: float


class PairStatus(msgspec.Struct, frozen=True, kw_only=True):
    prefill: str
    decode: str
    path: str
    gigabytes_per_s: float | None  # measured when the path was proven, of the slowest ranks
    slow: str = ""  # by how much it is slower than its link should be, and why
    pulls: Pulls  # since the start of the decode engine
    last_failure: str  # empty without one
    # ``open``: pulls have failed, and none is begun for a while. ``half_open``: one is tried.
    health: str = "closed"

    @property
    def shown_gigabytes_per_s(self) -> float | None:
        """Return the speed that every view shows: of pulls while they run, else of the proof."""
        return self.pulls.gigabytes_per_s or self.gigabytes_per_s


class RouteShare(msgspec.Struct, frozen=True, kw_only=True):
    """Counts prompts that took the same kind of route for the same reason."""

    kind: str  # ``pair``, or the role of the one engine that does all
    reason: str
    share: float

    def __str__(self) -> str:
        return f"{self.share:.0%} {self.kind} ({self.reason})"


def route_shares(routes: Iterable[tuple[str, str]]) -> list[RouteShare]:
    """Return the shares of kinds and reasons, the largest first."""
    counts = Counter(routes)
    return [
        RouteShare(kind=kind, reason=reason, share=count / counts.total())
        for (kind, reason), count in counts.most_common()
    ]


class StatusEvent(msgspec.Struct, frozen=True, kw_only=True):
    at: float  # Unix time in seconds
    kind: EventKind
    name: str  # the engine or pair; empty for the launch
    text: str
    is_bad: bool


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Holds times in milliseconds, estimated from the buckets of a histogram."""

    p50: float
    p95: float


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Tells what clients saw in a span of time that ended ``at``."""

    at: float  # Unix time in seconds
    span_s: float
    requests_per_s: float
    errors_per_s: float  # refused and failed requests, without those whose client left
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    first_token_ms: Percentiles | None  # null where no answer has begun
    inter_token_ms: Percentiles | None
    mean_inter_token_ms: float | None = None
    streams: float = 0.0  # mean number of running streams


class Bottleneck(msgspec.Struct, frozen=True, kw_only=True):
    """What limits a deployment, and which change would help."""

    kind: BottleneckKind
    why: str
    advice: str = ""  # a command and its effect; empty: none is needed
    # Loads of prefill engines by prompts, and of decode engines by tokens; above 1, work piles up
    prompts: float | None = None
    tokens: float | None = None
    engine: str = ""  # the engine that should take ``role``; empty: none should
    role: Role | None = None


NOT_SAID = Bottleneck(kind="unknown", why="not measured yet")


class DeploymentStatus(msgspec.Struct, frozen=True, kw_only=True):
    at: float  # Unix time in seconds
    version: str
    model: str
    state: DeploymentState
    uptime_s: float
    in_flight: int  # prompts that are being answered
    requests: int  # answers that were finished since the router started
    errors: int
    engines: Sequence[EngineStatus]
    gone: Sequence[GoneEngine]
    pairs: Sequence[PairStatus]
    routes: Sequence[RouteShare]  # of the last 100 prompts
    rates: Rates  # the last ten seconds
    # The two seconds with the fastest tokens since the router started; null: not known yet.
    fastest: Rates | None = None
    routing: RoutingPolicy = "load"
    queued_prompt_tokens: int = 0  # those of prompts that wait at the router for an engine
    bottleneck: Bottleneck = NOT_SAID
    history: Sequence[Rates]  # the last five minutes, oldest first
    events: Sequence[StatusEvent]  # the last 100, oldest first


class RequestSummary(msgspec.Struct, kw_only=True):
    id: HttpRequestId
    received_at: float  # Unix time in seconds, on the router's clock
    status: int | None = None  # none while it runs; 499: the client went away
    state: Literal["running", "done"] = "running"
    path: str
    model: str | None = None
    prefill: str | None = None  # engine that computed the prompt for another one
    decode: str | None = None  # engine of the tokens, after the first where ``prefill`` is set
    route: str | None = None
    explanation: str | None = None
    kv_path: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None  # not computed for it, as the client was told (``usage``)
    cached_device_tokens: int | None = None
    cached_host_tokens: int | None = None
    remote_tokens: int | None = None  # prompt tokens whose blocks decode has pulled
    queue_ms: float | None = None
    prefill_ms: float | None = None
    pull_ms: float | None = None  # from lease to proof
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
        """Return what is known of the request in one line, without its id and time."""
        apart = ("id", "received_at", "state", "status", "path", "prefill", "decode")
        values = {
            name: getattr(self, name)
            for name in RequestSummary.__struct_fields__
            if name not in apart
        }
        words = [f"{name}={_word(value)}" for name, value in values.items() if value is not None]
        first = [self.path] if self.status is None else [str(self.status), self.path]
        return escape_controls(" ".join([*first, *words]))


def _word(value: object) -> str:
    text = str(value)
    return f'"{text}"' if " " in text else text


class SpanView(msgspec.Struct, kw_only=True):
    """Shows a span in milliseconds from when the router received the request."""

    name: str
    process: str
    start_ms: float
    end_ms: float
    attributes: dict[str, Attribute] = {}
    parent: int = 0  # index of the span that it is a part of; 0: the request


class RequestTrace(RequestSummary, kw_only=True):
    spans: list[SpanView] = []
    dropped_spans: int = 0


class RequestList(msgspec.Struct, kw_only=True):
    requests: list[RequestSummary] = []
