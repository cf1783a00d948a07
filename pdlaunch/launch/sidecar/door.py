"""Accepts requests from other hosts for an engine that listens on a Unix socket.

::

    router, other sidecars ── TLS, token ──> door ── Unix socket ──> engine

If a client closes its connection, its request at the engine ends. If the engine breaks off an
answer, the door closes the client's connection.
"""

import logging
import os
from dataclasses import dataclass

from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry

from pdlaunch.config.http_names import url_of
from pdlaunch.errors import OverloadedError, StartupError
from pdlaunch.http.app import AppRoute, Guard, HttpApp, bearer_check, request_id_of
from pdlaunch.http.connections import HttpRunner, fit
from pdlaunch.http.engine_calls import CONNECT_S, Answer, CallError, EngineCalls
from pdlaunch.http.errors import RETRY_AFTER_S
from pdlaunch.http.headers import DATA_PARALLEL_HEADER, PASSED_HEADERS, REQUEST_ID_HEADER
from pdlaunch.http.kv_feed import KV_EVENTS_PATH, KVFeed
from pdlaunch.http.limits import engine_bodies
from pdlaunch.machine.network import LISTEN_BACKLOG
from pdlaunch.observe.metrics import RequestMetrics
from pdlaunch.protocol.certificates import server_context
from pdlaunch.protocol.process.bootstrap import DoorSpec
from pdlaunch.protocol.sockets import LaunchKeys

_logger = logging.getLogger(__name__)

# How long a client may read no byte of its answer; the same as for native engines.
READ_TIMEOUT_S = 60.0
MOST_TOKENS = 131_072  # assumed ``max_model_len`` of an engine if it is not known here
_ASKED = ("/health", "/version", "/metrics", "/v1/models", "/is_sleeping")
_COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
_TOLD = (*_COMPLETIONS, "/tokenize", "/detokenize", "/sleep", "/wake_up")
_TO_ENGINE = (hdrs.CONTENT_TYPE, hdrs.ACCEPT, DATA_PARALLEL_HEADER, *PASSED_HEADERS)
_TO_CLIENT = (hdrs.CONTENT_TYPE, hdrs.CACHE_CONTROL, hdrs.RETRY_AFTER, "X-Accel-Buffering")


@dataclass(eq=False, repr=False)
class Door:
    """Forwards requests with the launch's token, or the engine's key. Needs a running loop."""

    name: str
    spec: DoorSpec
    keys: LaunchKeys
    engine_url: str
    engine_key: str | None  # key of the engine, which clients of the door may also use
    kv_feed: KVFeed

    def __post_init__(self) -> None:
        spec, keys = self.spec, self.keys
        self._bodies = engine_bodies(spec.max_body_bytes, spec.max_model_len or MOST_TOKENS)
        self._calls = EngineCalls(CONNECT_S)
        assert keys.certificate is not None, "launches on several hosts have one"
        self._runner = HttpRunner(
            self._app(),
            max_connections=fit(spec.max_connections, num_each=4),
            tls=server_context(keys.certificate),
        )

    async def open(self) -> str:
        """Listen, and return the URL for other hosts. Raises StartupError."""
        spec = self.spec
        await self._runner.setup()
        try:
            site = web.TCPSite(self._runner, spec.bind_address, spec.port, backlog=LISTEN_BACKLOG)
            await site.start()
            self._runner.drop_stalled_readers(READ_TIMEOUT_S)
        except OSError as error:
            raise StartupError(
                f"{self.name} cannot listen on {spec.bind_address}:{spec.port}: "
                f"{os.strerror(error.errno or 0)}"
            ) from None
        return url_of("https", spec.advertise_address, self._runner.addresses[0][1])

    async def close(self) -> None:
        await self._runner.cleanup()
        await self._calls.close()

    def _app(self) -> web.Application:
        spec = self.spec
        keys = [key for key in (self.keys.http_token, self.engine_key) if key is not None]
        return HttpApp(
            [
                *(AppRoute("GET", path, self._pass_on) for path in _ASKED),
                *(AppRoute("POST", path, self._pass_on) for path in _TOLD),
                AppRoute("GET", KV_EVENTS_PATH, self.kv_feed.send),
            ],
            guard=Guard(spec.bind_address, allowed_hosts=(spec.advertise_address,)),
            check_key=bearer_check(
                keys,
                message="engines serve the launch's router; other clients need "
                "engine_api_key as bearer token, if it is set",
                code="invalid_api_key",
            ),
            metrics=RequestMetrics(CollectorRegistry(), {"engine": self.name}),
            max_body_bytes=self._bodies.max_body_bytes,
        ).app

    async def _pass_on(self, http: web.Request) -> web.StreamResponse:
        """Forward a request and its answer. Raises OverloadedError (503).

        If the engine breaks off its answer, cut the client's connection, so that a router sees it.
        """
        answer: Answer | None = None
        try:
            answer = await self._ask(http)
            return await _relayed(http, answer)
        except CallError as error:
            if answer is None and error.not_received:
                raise OverloadedError(
                    f"{self.name} cannot be reached: {error}",
                    status=503,
                    retry_after_s=RETRY_AFTER_S,
                    code="engine_not_there",
                ) from None
            _logger.warning("an answer to %s broke off: %s", http.path, error)
            if http.transport is not None:
                http.transport.abort()
            raise ConnectionResetError from None
        finally:
            # If the answer has not ended, this ends the request at the engine.
            if answer is not None:
                answer.close()

    async def _ask(self, http: web.Request) -> Answer:
        async with self._bodies.read(http) as body:
            headers = {name: http.headers[name] for name in _TO_ENGINE if name in http.headers}
            if self.engine_key is not None:
                headers[hdrs.AUTHORIZATION] = f"Bearer {self.engine_key}"
            headers[REQUEST_ID_HEADER] = request_id_of(http)
            return await self._calls.call(
                self.engine_url, http.method, http.rel_url.raw_path_qs, headers, body
            )


async def _relayed(http: web.Request, answer: Answer) -> web.StreamResponse:
    """Forward an answer piece by piece. Raises CallError, ConnectionError."""
    found = ((name, answer.headers.get(name.lower())) for name in _TO_CLIENT)
    headers = {name: value for name, value in found if value is not None}
    headers[REQUEST_ID_HEADER] = request_id_of(http)
    response = web.StreamResponse(status=answer.status, headers=headers)
    if (length := answer.headers.get("content-length", "")).isdecimal():
        response.content_length = int(length)
    await response.prepare(http)
    while piece := await answer.read_some():
        # This waits while the client reads too slowly, which also slows the engine down.
        await response.write(piece)
    await response.write_eof()
    return response
