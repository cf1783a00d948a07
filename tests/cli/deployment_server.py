"""An HTTP server that answers as a router does: status and requests."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

import msgspec
from aiohttp import web

from pdlaunch.protocol.status import (
    DeploymentStatus,
    EngineReading,
    EngineStatus,
    GoneEngine,
    PairStatus,
    Percentiles,
    Pulls,
    Rates,
    RequestList,
    RequestSummary,
    RouteShare,
    StatusEvent,
)
from tests.web_server import web_server

HOSTILE = "[red]x[/red]\x1b[31m\x07\n<b>"
"""Markup of rich, commands of terminals, a line break, HTML."""


def rates(number: float) -> Rates:
    return Rates(
        at=1.7e9,
        span_s=2.0,
        requests_per_s=number,
        errors_per_s=0.0,
        prompt_tokens_per_s=100.0 * number,
        output_tokens_per_s=10.0 * number,
        first_token_ms=Percentiles(p50=11.4, p95=26.0),
        inter_token_ms=Percentiles(p50=1.25, p95=16.0),
    )


PULLS = Pulls(number=7, num_bytes=10**9, bytes_per_s=1.5e9)


def engine(name: str, role: str, *, kv_usage: float = 0.25, **fields: object) -> EngineStatus:
    reading = EngineReading(
        running=3,
        waiting=1,
        kv_usage=kv_usage,
        host_usage=None,
        cache={"device": 0.3, "host": 0.1, "remote": 0.2},
        pulls=msgspec.structs.replace(PULLS, bytes_per_s=1.5e9 if role == "decode" else 0.0),
        failed_pulls=0,
        refused_pulls=0,
    )
    values: dict[str, object] = {
        "kind": "native",
        "version": "0.1.0",
        "url": "http://127.0.0.1:8101",
        "host": "127.0.0.1",
        "state": "ready",
        "is_down": False,
        "reason": "",
        "load": 4,
        "reading": reading,
    }
    return msgspec.convert(
        {"name": name, "role": role} | values | fields, EngineStatus, from_attributes=True
    )


def deployment(*engines: EngineStatus, **fields: object) -> DeploymentStatus:
    found = engines or (engine("decode-0", "decode", kv_usage=0.5), engine("prefill-0", "prefill"))
    pair = PairStatus(
        prefill="prefill-0",
        decode="decode-0",
        path="p2p/posix_fd/batch1",
        gigabytes_per_s=391.7,
        pulls=PULLS,
        last_failure="",
    )
    values: dict[str, object] = {
        "at": 1.7e9,
        "version": "0.1.0",
        "model": "tiny",
        "state": "ok",
        "uptime_s": 4000.0,
        "in_flight": 3,
        "requests": 12,
        "errors": 0,
        "engines": list(found),
        "gone": [GoneEngine(name="decode-7", role="decode", gone_s=70.0)],
        "pairs": [pair],
        "rates": rates(4.0),
        "routes": [RouteShare(kind="pair", reason=HOSTILE, share=0.75)],
        "history": [rates(4.0)],
        "events": [
            StatusEvent(at=1.7e9, kind="engine", name="decode-7", text=HOSTILE, is_bad=True)
        ],
    }
    return msgspec.convert(values | fields, DeploymentStatus, from_attributes=True)


def request(request_id: str, **fields: object) -> RequestSummary:
    values: dict[str, object] = {
        "id": request_id,
        "received_at": 1.7e9,
        "path": "/v1/completions",
        "state": "running",
        "route": "prefill-0->decode-0",
        "prompt_tokens": 300,
        "first_token_ms": 15.7,
        "total_ms": 1234.5,
    }
    return msgspec.convert(values | fields, RequestSummary)


class DeploymentServer:
    """``status`` and ``requests`` may be replaced while it runs; ``key`` is asked for if set.

    ``queries``: those for requests.
    """

    def __init__(self) -> None:
        self.status = deployment()
        self.requests: list[RequestSummary] = [request("the-slow-one"), request("another")]
        self.queries: list[str] = []
        self.key: str | None = None
        self.url = ""

    def answer(self, path: str, key: str | None) -> tuple[int, bytes]:
        if self.key is not None and key != f"Bearer {self.key}":
            return 401, b'{"error": {"message": "the API key is missing or wrong"}}'
        if path == "/pdlaunch/status":
            return 200, msgspec.json.encode(self.status)
        if path.startswith("/pdlaunch/requests?"):
            self.queries.append(path.partition("?")[2])
            return 200, msgspec.json.encode(RequestList(requests=self.requests))
        for one in self.requests:
            if path == f"/pdlaunch/requests/{quote(one.id, safe='')}":
                return 200, msgspec.json.encode(one)
        return 404, b'{"error": {"message": "the router has no request with this id"}}'


@contextmanager
def running_server() -> Iterator[DeploymentServer]:
    told = DeploymentServer()

    async def answer(request: web.Request) -> web.Response:
        status, body = told.answer(request.raw_path, request.headers.get("Authorization"))
        return web.Response(status=status, body=body)

    with web_server(answer) as told.url:
        yield told
