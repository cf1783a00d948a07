"""Writes one line for each request that has ended, and for each that was refused."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from pdlaunch.observe.logs import FIELDS, escape_controls
from pdlaunch.protocol.requests import RequestSummary
from pdlaunch.router.request_record import RequestRecord

logger = logging.getLogger(__name__)


class RequestLines:
    """Logs each request; ``show`` gets the line with the id, for a terminal that tells the time."""

    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        self._show = show

    def write(self, record: RequestRecord) -> None:
        """Write the line of a request that has ended."""
        if self._show is None and not logger.isEnabledFor(logging.INFO):
            return
        summary = record.summary()
        text, content = format_request(summary), record.content or {}
        text += "".join(f' {name}="{value}"' for name, value in content.items())
        fields = lambda: {"request": msgspec.to_builtins(summary) | content}  # noqa: E731
        logger.info("%s", text, extra={FIELDS: fields})
        if self._show is not None:
            self._show(escape_controls(f"[{summary.id}] {text}"))


def format_request(summary: RequestSummary) -> str:
    """Return what is known of a request in one line, without its id and time."""
    words = [
        f"{summary.status} {summary.path}",
        *_known(summary.model, "model={}"),
        *_known(summary.route and summary.route.replace("->", " -> "), "{}"),
        *_known(summary.kv_path, "over {}"),
        *_known(summary.prompt_tokens, "prompt={}"),
        *_cached(summary),
        *_known(summary.queue_ms, "queue={:.1f}ms"),
        *_known(summary.prefill_ms, "prefill={:.1f}ms"),
        *_pull(summary),
        *_known(summary.first_token_ms, "first={:.1f}ms"),
        *_known(summary.output_tokens, "tokens={}"),
        *_known(summary.ms_per_token, "{:.2f}ms/token"),
        *_known(summary.total_ms, "total={:.1f}ms"),
        *([f"retries={summary.retries}"] if summary.retries else []),
        *_known(summary.finish_reason, "finish={}"),
        *_known(summary.explanation, "why: {}"),
        *_known(summary.error, "error: {}"),
    ]
    return escape_controls(" ".join(words))


def _known(value: object, form: str) -> list[str]:
    return [] if value is None else [form.format(value)]


def _cached(summary: RequestSummary) -> list[str]:
    counts = {
        "device": summary.cached_device_tokens,
        "host": summary.cached_host_tokens,
        "remote": summary.remote_tokens,
    }
    known = " ".join(f"{name} {count}" for name, count in counts.items() if count is not None)
    known = known or " ".join(_known(summary.cached_tokens, "{}"))
    return [f"(cached {known})"] if known else []


def _pull(summary: RequestSummary) -> list[str]:
    if summary.pull_ms is None:
        return []
    parts = [
        f"pull={summary.pull_ms:.1f}ms",
        *_known(summary.pull_mb, "{:.2f}MB"),
        *_known(summary.pull_gb_s, "{:.2f}GB/s"),
    ]
    if summary.verified is not None:
        parts.append("verified" if summary.verified else "unverified")
    return parts
