"""Draws what became of a request: a line for each span, under the process that it belongs to.

::

    prefill-0/rank-0
      queue                    ▏                                       0.2 ms
      prefill 512 tokens       ▕██████████████████████▏             6436.3 ms
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from pdlaunch.observe.logs import escape_controls
from pdlaunch.observe.spans import Attribute
from pdlaunch.protocol.requests import RequestTrace, SpanView
from pdlaunch.router.request_lines import format_request

_TIME_COLUMNS = 13
_STYLES = {"queue": "yellow", "lease": "yellow", "read": "cyan", "pull": "cyan"}


def print_trace(console: Console, trace: RequestTrace) -> None:
    """Print a request's line, then its spans, process by process."""
    console.print(request_line(trace), soft_wrap=not console.is_terminal)
    for row in span_rows(trace, console.width, is_ascii=console.options.ascii_only):
        console.print(row)


def request_line(trace: RequestTrace) -> Text:
    """Return the line that router.log has of the request."""
    return Text(escape_controls(f"{trace.id}  {format_request(trace)}"), style="bold")


def span_rows(trace: RequestTrace, columns: int, *, is_ascii: bool) -> Iterator[Text]:
    """Yield the name of each process and a line for each of its spans, in ``columns``."""
    by_process: dict[str, list[SpanView]] = {}
    for span in trace.spans:
        by_process.setdefault(span.process, []).append(span)
    told = {process.partition("/")[0] for process in by_process}
    for engine in (trace.prefill, trace.decode):
        if engine is not None and engine not in told:
            by_process[engine] = []
    for process, spans in by_process.items():
        yield Text(escape_controls(process), style="bold cyan", overflow="ellipsis")
        if not spans:
            yield Text("  unknown: this engine tells nothing of itself", style="dim")
        for span in spans:
            yield _row(span, trace.total_ms or 0.0, max(columns, 40), is_ascii=is_ascii)
    if trace.dropped_spans:
        yield Text(f"{trace.dropped_spans} more are not remembered", style="dim")


def _row(span: SpanView, total_ms: float, width: int, *, is_ascii: bool) -> Text:
    """Return one line of ``width`` columns: name, place in the request's time, duration."""
    name_columns = max(12, min(int(width * 0.42), width - 10 - _TIME_COLUMNS))
    bar_columns = width - name_columns - _TIME_COLUMNS
    label = Text(escape_controls(f"  {span.name}{_details(span.attributes)}"))
    label.truncate(name_columns - 1, overflow="crop" if is_ascii else "ellipsis", pad=True)
    full, mark = ("#", "|") if is_ascii else ("█", "▏")
    scale = (bar_columns - 1) / total_ms if total_ms > 0 else 0.0
    start = min(bar_columns - 1, max(0, int(span.start_ms * scale)))
    end = min(bar_columns, max(start, round(span.end_ms * scale)))
    # An instant is a mark.
    bar = (" " * start + (full * (end - start) or mark)).ljust(bar_columns)
    failed = "error" in span.attributes or span.attributes.get("ok") is False
    duration_ms = span.end_ms - span.start_ms
    time = f"{duration_ms:.1f} ms" if duration_ms else f"@{span.start_ms:.1f} ms"
    return Text.assemble(
        label,
        " ",
        (bar, "red" if failed else _STYLES.get(span.name, "green")),
        (f"{time:>{_TIME_COLUMNS - 1}}", "" if duration_ms else "dim"),
        no_wrap=True,
    )


def _details(attributes: dict[str, Attribute]) -> str:
    """Return what a reader wants to see beside the name."""
    parts: list[str] = []
    if "verified" in attributes:
        parts.append("verified" if attributes["verified"] else "unverified")
    for key, value in attributes.items():
        if key == "bytes" and isinstance(value, int | float):
            parts.append(f"{value / 1e6:.1f} MB")
        elif key == "gb_s" and isinstance(value, int | float):
            parts.append(f"{value:.1f} GB/s")
        elif key in ("tokens", "blocks", "prompts"):
            parts.append(f"{value} {key}")
        elif key.endswith("_tokens") and value:
            parts.append(f"{value} {key.removesuffix('_tokens')}")
        elif key in ("error", "reason"):
            parts.append(str(value))
    return " " + ", ".join(parts) if parts else ""
