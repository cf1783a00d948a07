"""Defines what the router tells of the requests that it has served: ``/pdlaunch/requests``.

None stands for what is unknown: engines that are not ours tell less of themselves. No text of a
prompt or an output is among it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pdlaunch.observe.spans import Attribute
from pdlaunch.protocol.ids import HttpRequestId


class RequestSummary(msgspec.Struct, kw_only=True):
    """Says in one line how a request went."""

    id: HttpRequestId
    received_at: float  # Unix time in seconds, on the router's clock
    status: int | None = None  # none while it runs; 499: the client went away
    state: Literal["running", "done"] = "running"
    path: str
    model: str | None = None
    prefill: str | None = None  # engine that computed the prompt for another one
    decode: str | None = None
    """Engine that computed the tokens, after the first one where ``prefill`` is set."""
    route: str | None = None
    explanation: str | None = None
    kv_path: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """Prompt tokens that were not computed for it, as the client was told (``usage``)."""
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


class SpanView(msgspec.Struct, kw_only=True):
    """Shows a span in milliseconds from when the router received the request."""

    name: str
    process: str
    start_ms: float
    end_ms: float
    attributes: dict[str, Attribute] = {}
    parent: int = 0  # index of the span that it is a part of; 0: the request


class RequestTrace(RequestSummary, kw_only=True):
    """Tells all that is known of a request."""

    spans: list[SpanView] = []
    dropped_spans: int = 0


class RequestList(msgspec.Struct, kw_only=True):
    """Answers /pdlaunch/requests."""

    requests: list[RequestSummary] = []
