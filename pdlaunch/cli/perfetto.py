"""Writes requests as a file for ui.perfetto.dev: the JSON form of Chrome's trace events.

Source: "Trace Event Format", the events ``X`` (complete), ``i`` (instant) and ``M`` (metadata).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pdlaunch.observe.logs import escape_controls
from pdlaunch.protocol.requests import RequestTrace, SpanView

Event = dict[str, Any]


def trace_events(traces: Sequence[RequestTrace]) -> dict[str, Any]:
    """Return the document: a track for each process, in it lanes for each request."""
    names = dict.fromkeys(span.process for trace in traces for span in trace.spans)
    processes = {name: number for number, name in enumerate(names, 1)}
    events = [
        _metadata("process_name", number, 0, escape_controls(name))
        for name, number in processes.items()
    ]
    lanes: dict[int, int] = {}
    for trace in traces:
        for name, process in processes.items():
            spans = [span for span in trace.spans if span.process == name]
            for lane in _lanes(spans):
                thread = lanes[process] = lanes.get(process, 0) + 1
                events.append(_metadata("thread_name", process, thread, escape_controls(trace.id)))
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
    if end_us > start_us:
        return event | {"ph": "X", "dur": end_us - start_us}
    return event | {"ph": "i", "s": "t"}


def _metadata(kind: str, process: int, thread: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
