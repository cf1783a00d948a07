"""Sends the spans of requests to a collector of OpenTelemetry, over OTLP/HTTP.

::

    chat smollm2                       router, the child of the client's span (traceparent)
    ├─ prefill at prefill-0            router
    │  ├─ tokenize                     prefill-0
    │  └─ prefill                      prefill-0/rank-0
    └─ decode at decode-0 ..

Instants become events of the span above them. Names and attributes of the first one are those of
the semantic conventions for GenAI; no text of prompts or outputs is among them. A thread of the
library sends, so a collector that is slow or away holds up no request: its spans are lost.

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
from pdlaunch.router.request_record import ROUTER, RequestRecord

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
        self._otel: Any = trace
        self._processor: Any = BatchSpanProcessor(OTLPSpanExporter(url, timeout=_SEND_TIMEOUT_S))
        self._sampler = ParentBased(TraceIdRatioBased(sample))
        self._propagator = TraceContextTextMapPropagator()
        # One for each process: its provider says whose the spans are.
        self._tracers: dict[str, Any] = {}

    def begin(self, record: RequestRecord, headers: Mapping[str, str]) -> None:
        """Begin the span of a request that has come with ``headers``.

        Engines get it as their parent, in ``record.trace_headers``.
        """
        names = (TRACEPARENT_HEADER, TRACESTATE_HEADER)
        known = {name: headers[name] for name in names if name in headers}
        record.otel_span = self._tracer(ROUTER).start_span(
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
        operation = _OPERATIONS.get(trace.path)
        if operation is not None:
            root.update_name(f"{operation} {trace.model}" if trace.model else operation)
        root.set_attributes(_root_attributes(trace, operation))
        if trace.error is not None and (trace.status or 0) >= 500:
            root.set_status(self._otel.StatusCode.ERROR, trace.error)
        self._add_children(root, trace)
        root.end(_ns(trace.received_at, trace.total_ms or 0.0))

    def close(self) -> None:
        """Send what is left, and wait a moment for it: a collector that is away gets nothing."""

        def finish() -> None:
            self._processor.force_flush()
            self._processor.shutdown()

        sending = threading.Thread(target=finish, name="otlp-end", daemon=True)
        sending.start()
        sending.join(_FLUSH_S)

    def _add_children(self, root: Any, trace: RequestTrace) -> None:
        kinds = self._otel.SpanKind
        made: dict[int, tuple[Any, int]] = {}  # spans and their ends, by place in the trace
        # The router's own come first: engines' spans are inside its calls.
        numbered = enumerate(trace.spans[1:], 1)
        for place, span in sorted(numbered, key=lambda each: each[1].process != ROUTER):
            parent, _ = made.get(span.parent, (root, 0))
            start, end = _ns(trace.received_at, span.start_ms), _ns(trace.received_at, span.end_ms)
            if start == end:
                parent.add_event(span.name, span.attributes, start)
                continue
            is_call = span.process == ROUTER and " at " in span.name
            child = self._tracer(span.process).start_span(
                span.name,
                context=self._otel.set_span_in_context(parent),
                kind=kinds.CLIENT if is_call else kinds.INTERNAL,
                attributes=span.attributes,
                start_time=start,
            )
            made[place] = child, end
        # Only now: what is inside a call adds events to it.
        for child, end in made.values():
            child.end(end)

    def _tracer(self, process: str) -> Any:
        if process not in self._tracers:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider

            names = {
                "service.name": "pdlaunch",
                "service.version": __version__,
                "service.instance.id": process,
            }
            provider = TracerProvider(
                sampler=self._sampler, resource=Resource.create(names), shutdown_on_exit=False
            )
            provider.add_span_processor(self._processor)
            self._tracers[process] = provider.get_tracer("pdlaunch", __version__)
        return self._tracers[process]


def _root_attributes(trace: RequestTrace, operation: str | None) -> dict[str, Any]:
    tiers = [trace.cached_device_tokens, trace.cached_host_tokens]
    known = [count for count in tiers if count is not None]
    attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "pdlaunch",
        "gen_ai.request.model": trace.model,
        "gen_ai.usage.input_tokens": trace.prompt_tokens,
        "gen_ai.usage.output_tokens": trace.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": sum(known) if known else trace.cached_tokens,
        "gen_ai.response.finish_reasons": trace.finish_reason and trace.finish_reason.split(","),
        "gen_ai.response.time_to_first_chunk": trace.first_token_ms and trace.first_token_ms / 1e3,
        "http.response.status_code": trace.status,
        "error.type": str(trace.status) if trace.error else None,
        "pdlaunch.request_id": trace.id,
    }
    for name in ("prefill", "decode", "kv_path", "explanation", "retries", "verified"):
        attributes[f"pdlaunch.{name}"] = getattr(trace, name)
    return {name: value for name, value in attributes.items() if value is not None}


def _ns(unix_s: float, offset_ms: float = 0.0) -> int:
    return int(unix_s * 1e9) + int(offset_ms * 1e6)
