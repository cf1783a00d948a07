"""``pdlaunch trace`` shows what became of requests, as a waterfall or for ui.perfetto.dev.

::

    prefill-0/rank-0
      queue                    ▏                                       0.2 ms
      prefill 512 tokens       ▕██████████████████████▏             6436.3 ms
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.cli import EXIT_FAILED
from pdlaunch.cli.options import ApiKeyOption, UrlOption
from pdlaunch.cli.output import print_errors
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import Choice, read_requests, read_trace, reading_api
from pdlaunch.observe.logs import escape_controls
from pdlaunch.observe.spans import Attribute
from pdlaunch.protocol.ids import HttpRequestId
from pdlaunch.protocol.status import RequestTrace, SpanView
from pdlaunch.router.request_history import format_request

Event = dict[str, Any]


def trace(
    request_id: str | None = typer.Argument(
        None, metavar="ID", help="Id of a request, as router.log has it."
    ),
    last: bool = typer.Option(False, "--last", help="The last request; the default."),
    slowest: int | None = typer.Option(
        None, min=1, max=1000, help="The slowest ones.", metavar="N"
    ),
    failed: bool = typer.Option(False, "--failed", help="The last one that failed or was refused."),
    form: Literal["waterfall", "perfetto", "json"] = typer.Option(
        "waterfall",
        "--format",
        help="`perfetto` writes a file for ui.perfetto.dev, `json` one object a line.",
    ),
    output: Path | None = typer.Option(
        None, help="File for `perfetto`.", metavar="FILE", dir_okay=False
    ),
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Show what became of a request, over all processes: where it waited, what was computed and
    pulled, and where its time went.
    """
    if sum([request_id is not None, last, slowest is not None, failed]) > 1:
        raise typer.BadParameter("choose one of ID, --last, --slowest and --failed")
    if output is not None and form != "perfetto":
        raise typer.BadParameter("--output is for --format perfetto; redirect the others")
    choice: Choice = "slowest" if slowest else "failed" if failed else "last"
    try:
        api = reading_api(url, api_key)
        ids = [HttpRequestId(request_id)] if request_id is not None else []
        if request_id is None:
            ids = [one.id for one in read_requests(api, choice, slowest or 1)]
        if not ids:
            raise PdlaunchError(
                "no request has failed" if failed else "the router has served no request yet"
            )
        _show([read_trace(api, one) for one in ids], form, output)
    except PdlaunchError as error:
        print_errors([error])
        raise typer.Exit(EXIT_FAILED) from None


def _show(traces: Sequence[RequestTrace], form: str, output: Path | None) -> None:
    if form == "json":
        for trace in traces:
            sys.stdout.write(msgspec.json.encode(trace).decode() + "\n")
    elif form == "perfetto":
        name = re.sub(r"[^\w.-]", "_", traces[0].id)[:80]
        file = output or Path(f"pdlaunch-trace-{name}.json")
        try:
            file.write_bytes(msgspec.json.encode(trace_events(traces)))
        except OSError as error:
            why = error.strerror or str(error)
            raise PdlaunchError(f"--output {file} cannot be written: {why}") from error
        Console().print(Text(f"{file}: open it at https://ui.perfetto.dev"), soft_wrap=True)
    else:
        console = Console(highlight=False)
        for number, trace in enumerate(traces):
            if number:
                console.print()
            print_trace(console, trace)


def trace_events(traces: Sequence[RequestTrace]) -> dict[str, Any]:
    """Return Chrome's trace events for ui.perfetto.dev: a track for each process, in it lanes for
    each request.

    Source: "Trace Event Format", the events ``X`` (complete), ``i`` (instant) and ``M`` (metadata).
    """
    names = dict.fromkeys(span.process for trace in traces for span in trace.spans)
    events: list[Event] = []
    for process, name in enumerate(names, 1):
        events.append(_metadata("process_name", process, 0, name))
        thread = 0
        for trace in traces:
            for lane in _lanes([span for span in trace.spans if span.process == name]):
                thread += 1
                events.append(_metadata("thread_name", process, thread, trace.id))
                events += [_event(trace, span, process, thread) for span in lane]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _lanes(spans: Sequence[SpanView]) -> list[list[SpanView]]:
    """Spread spans so that those of one lane lie within or beside each other, as viewers need."""
    lanes: list[tuple[list[SpanView], list[SpanView]]] = []
    # Outer spans first: an inner one then finds the lane of the one around it.
    for span in sorted(spans, key=lambda span: (span.start_ms, -span.end_ms)):
        for lane, open_spans in lanes:  # noqa: B007 - it is used after the loop
            while open_spans and open_spans[-1].end_ms <= span.start_ms:
                open_spans.pop()
            if not open_spans or span.end_ms <= open_spans[-1].end_ms:
                break
        else:
            lane, open_spans = [], []
            lanes.append((lane, open_spans))
        lane.append(span)
        open_spans.append(span)
    return [lane for lane, _ in lanes]


def _event(trace: RequestTrace, span: SpanView, process: int, thread: int) -> Event:
    """Return a span in microseconds since 1970, so that several requests share one time line.

    They are whole numbers: a fraction of such a large one is rounded so that spans which end
    together overlap, and viewers drop those.
    """
    start_us, end_us = round(span.start_ms * 1e3), round(span.end_ms * 1e3)
    event: Event = {
        "name": escape_controls(span.name),
        "cat": "request",
        "pid": process,
        "tid": thread,
        "ts": round(trace.received_at * 1e6) + start_us,
        "args": {"request": trace.id, **span.attributes},
    }
    is_instant = end_us <= start_us
    return event | ({"ph": "i", "s": "t"} if is_instant else {"ph": "X", "dur": end_us - start_us})


def _metadata(kind: str, process: int, thread: int, name: str) -> Event:
    shown = {"name": escape_controls(name)}
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": shown}


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
