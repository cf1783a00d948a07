"""Sends the spans of requests to a collector of OpenTelemetry, over OTLP/HTTP.

::

    chat                               the child of the client's span (traceparent)
    ├─ prefill at prefill-0            pdlaunch.process: router
    │  └─ prefill                      pdlaunch.process: prefill-0/rank-0
    └─ decode at decode-0 ..

Instants become events of the span above them. No text of prompts or outputs is among them. A thread
of the library sends, so a collector that is slow or away holds up no request: its spans are lost.

The library is imported only where it is wanted: it takes 0.2 s.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from pdlaunch import __version__
from pdlaunch.errors import ConfigError
from pdlaunch.http.headers import TRACEPARENT_HEADER, TRACESTATE_HEADER
from pdlaunch.protocol.status import RequestTrace
from pdlaunch.router.request_record import RequestRecord

_FLUSH_S = 2.0  # seconds that the last spans get when the router leaves
_SEND_TIMEOUT_S = 5.0
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


class OtlpExporter:
    """Begins a span with each request and ends it with the record, unless it is not sampled.

    ``sample``: the share of requests that are sent; a client's span decides for its own. Raises
    ConfigError where the library is not installed.
    """

    def __init__(self, endpoint: str, sample: float) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                f"spans cannot be sent: {error}",
                field="tracing.otlp_endpoint",
                value=endpoint,
                fix="pip install 'pdlaunch[otel]', or leave it out",
            ) from None
        _, _, path = endpoint.partition("://")[2].partition("/")
        url = endpoint if path else f"{endpoint.rstrip('/')}/v1/traces"
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample)),
            resource=Resource.create({"service.name": "pdlaunch", "service.version": __version__}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(url, timeout=_SEND_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer: Any = self._provider.get_tracer("pdlaunch", __version__)
        self._otel: Any = trace
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, record: RequestRecord, headers: Mapping[str, str]) -> None:
        """Begin the span of a request that has come with ``headers``.

        Engines get it as their parent, in ``record.trace_headers``.
        """
        names = (TRACEPARENT_HEADER, TRACESTATE_HEADER)
        known = {name: headers[name] for name in names if name in headers}
        record.otel_span = self._tracer.start_span(
            _OPERATIONS.get(record.path, f"POST {record.path}"),
            context=self._propagator.extract(known),
            kind=self._otel.SpanKind.SERVER,
            attributes={"http.request.method": "POST", "url.path": record.path},
            start_time=_ns(record.received_at),
        )
        context = self._otel.set_span_in_context(record.otel_span)
        self._propagator.inject(record.trace_headers, context)

    def end(self, record: RequestRecord) -> None:
        root, record.otel_span = record.otel_span, None
        if root is None or not root.is_recording():
            return
        trace = record.trace()
        root.set_attributes(_root_attributes(trace))
        if trace.error is not None and (trace.status or 0) >= 500:
            root.set_status(self._otel.StatusCode.ERROR, trace.error)
        spans = [root]  # by their place in the trace
        ends = []
        for span in trace.spans[1:]:
            # A parent begins before its parts, and so stands before them.
            parent = spans[span.parent]
            start, end = _ns(trace.received_at, span.start_ms), _ns(trace.received_at, span.end_ms)
            attributes = {"pdlaunch.process": span.process} | span.attributes
            if start == end:
                parent.add_event(span.name, attributes, start)
                spans.append(parent)
                continue
            context = self._otel.set_span_in_context(parent)
            spans.append(
                self._tracer.start_span(span.name, context, attributes=attributes, start_time=start)
            )
            ends.append((spans[-1], end))
        # Only now: what is inside a call adds events to it.
        for child, end in ends:
            child.end(end)
        root.end(_ns(trace.received_at, trace.total_ms or 0.0))

    def close(self) -> None:
        """Send what is left, and wait a moment for it: a collector that is away gets nothing."""
        sending = threading.Thread(target=self._provider.shutdown, name="otlp-end", daemon=True)
        sending.start()
        sending.join(_FLUSH_S)


def _root_attributes(trace: RequestTrace) -> dict[str, Any]:
    attributes = {
        "gen_ai.operation.name": _OPERATIONS.get(trace.path),
        "gen_ai.request.model": trace.model,
        "gen_ai.usage.input_tokens": trace.prompt_tokens,
        "gen_ai.usage.output_tokens": trace.output_tokens,
        "gen_ai.response.finish_reasons": trace.finish_reason and trace.finish_reason.split(","),
        "http.response.status_code": trace.status,
        "pdlaunch.request_id": trace.id,
    }
    for name in ("prefill", "decode", "kv_path", "explanation", "retries", "verified"):
        attributes[f"pdlaunch.{name}"] = getattr(trace, name)
    return {name: value for name, value in attributes.items() if value is not None}


def _ns(unix_s: float, offset_ms: float = 0.0) -> int:
    return int(unix_s * 1e9) + int(offset_ms * 1e6)
