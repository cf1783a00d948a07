"""A receiver of OTLP over HTTP, which keeps the spans that it gets."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class Received:
    """One span, and the process that it belongs to."""

    def __init__(self, span: Any, resource: dict[str, Any]) -> None:
        self.name: str = span.name
        self.service = resource["service.name"]
        self.trace_id = span.trace_id.hex()
        self.id = span.span_id.hex()
        self.parent = span.parent_span_id.hex()
        self.seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        self.attributes = attributes_of(span.attributes)
        self.process = self.attributes.get("pdlaunch.process", "router")
        self.events = {event.name: attributes_of(event.attributes) for event in span.events}
        self.failed = span.status.code == span.status.STATUS_CODE_ERROR


def attributes_of(pairs: Any) -> dict[str, Any]:
    return {pair.key: value_of(pair.value) for pair in pairs}


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(one) for one in value.array_value.values]
    return getattr(value, kind)


class Collector:
    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    raw = gzip.decompress(raw)
                assert self.headers["Content-Type"] == "application/x-protobuf"
                collector.paths.add(self.path)
                received = []
                for group in ExportTraceServiceRequest.FromString(raw).resource_spans:
                    resource = attributes_of(group.resource.attributes)
                    for scope in group.scope_spans:
                        received += [Received(span, resource) for span in scope.spans]
                # All at once: who has waited for one of a message finds the others, too.
                collector.spans += received
                payload = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,)).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def named(self, name: str) -> Received:
        (span,) = [span for span in self.spans if span.name == name]
        return span


@contextlib.contextmanager
def running_collector() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.server.shutdown()
        collector.server.server_close()
