"""``pdlaunch trace`` shows what became of requests."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.cli import EXIT_FAILED
from pdlaunch.cli.engines import UrlOption
from pdlaunch.cli.output import print_errors
from pdlaunch.cli.status import ApiKeyOption
from pdlaunch.cli.waterfall import print_trace
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.admin import Choice, read_requests, read_trace, reading_api
from pdlaunch.observe.logs import escape_controls
from pdlaunch.protocol.ids import HttpRequestId
from pdlaunch.protocol.requests import RequestTrace, SpanView

Event = dict[str, Any]


def trace(
    request_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="Id of a request, as router.log has it.")
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The last request; the default.")] = False,
    slowest: Annotated[
        int | None, typer.Option(min=1, max=1000, help="The slowest ones.", metavar="N")
    ] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="The last one that failed or was refused.")
    ] = False,
    form: Annotated[
        Literal["waterfall", "perfetto", "json"],
        typer.Option(
            "--format",
            help="`perfetto` writes a file for ui.perfetto.dev, `json` one object a line.",
        ),
    ] = "waterfall",
    output: Annotated[
        Path | None, typer.Option(help="File for `perfetto`.", metavar="FILE", dir_okay=False)
    ] = None,
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
