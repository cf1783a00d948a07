"""Brings what prefill engines state about their KV blocks to decode engines on other hosts.

::

    decode engine ── socket ──> its sidecar ── TLS, token ──> sidecar of the prefill engine ── file
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path

from aiohttp import web

from pdlaunch.errors import RequestError
from pdlaunch.http.app import AppRoute
from pdlaunch.http.engine_calls import CONNECT_S, CallError, EngineCalls
from pdlaunch.http.openapi import Operation
from pdlaunch.machine.network import tcp_endpoint

PATH = "/pdlaunch/kv-statements"
TIMEOUT_S = 8.0
"""Shorter than an engine waits, so that it is told why."""
MAX_STATEMENT_BYTES = 64 * 1024**2
"""A prompt of a million tokens has a few megabytes: block ids, and checksums by block and head."""
_NAME = re.compile(r"[0-9a-f]{40}")


def statement_route(folder: Path) -> AppRoute:
    """Return the route at which sidecars of other hosts read statements of this one's engine."""

    async def read(http: web.Request) -> web.StreamResponse:
        name = http.match_info["name"]
        try:
            if _NAME.fullmatch(name):
                # A few hundred bytes, in memory or nearly so: no thread is worth it.
                return web.Response(body=(folder / name).read_bytes())
        except FileNotFoundError:
            pass
        raise RequestError("there is no such statement (any more)", status=404, code="not_found")

    operation = Operation("Return what a prefill engine states about the KV blocks of a request.")
    return AppRoute("GET", PATH + "/{name}", read, None, operation)


class StatementDesk:
    """Asks other sidecars for the statements that this one's engine wants; belongs to the loop.

    ``urls``: returns the doors of prefill engines by their side channels, which engines are told.
    """

    def __init__(
        self, path: Path, token: str, tls: ssl.SSLContext, urls: Callable[[], Mapping[str, str]]
    ) -> None:
        self._path = path
        self._urls = urls
        self._calls = EngineCalls(CONNECT_S, tls)
        self._headers = {"Authorization": f"Bearer {token}"}
        app = web.Application()
        app.router.add_get("/", self._answer)
        self._runner = web.AppRunner(app, access_log=None)

    async def open(self) -> None:
        """Listen on the socket, in a folder that this user alone can open."""
        self._path.unlink(missing_ok=True)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self._path)).start()

    async def close(self) -> None:
        await self._runner.cleanup()
        await self._calls.close()

    async def _answer(self, http: web.Request) -> web.Response:
        """Answer 200 with the statement, 404 when there is none, 502 when nobody can tell."""
        name, host, port = (http.query.get(key, "") for key in ("name", "host", "port"))
        if not _NAME.fullmatch(name) or not port.isdecimal():
            return web.Response(status=400, text="no statement has this name")
        url = self._urls().get(tcp_endpoint(host, int(port)))
        if url is None:
            return web.Response(status=502, text="no engine of the launch is there")
        try:
            status, body = await self._calls.ask(
                url,
                "GET",
                f"{PATH}/{name}",
                self._headers,
                timeout_s=TIMEOUT_S,
                max_bytes=MAX_STATEMENT_BYTES,
            )
        except CallError as error:
            return web.Response(status=502, text=str(error))
        if status not in (200, 404):
            return web.Response(status=502, text=f"its sidecar answered {status}")
        return web.Response(status=status, body=body)
