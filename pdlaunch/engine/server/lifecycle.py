"""Runs the server process from its start to its end, under the supervisor.

::

    bind HTTP -> Register -> load the model's text side ──────┬─> Ready -> serve -> Drain -> Stop
                   Registry -> rank 0 found -> Hello, Welcome ─┘

Builds the HTTP application of one engine, and answers all requests except completions.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.http_names import is_loopback, url_of
from pdlaunch.config.model_files.weights import refuse_changes
from pdlaunch.engine.server.engine_service import EngineService
from pdlaunch.engine.server.generate import generate
from pdlaunch.engine.server.rank_link import RankLink
from pdlaunch.engine.server.served_model import ServedModel, load_served_model
from pdlaunch.errors import OverloadedError, PdlaunchError, RequestError, StartupError
from pdlaunch.http.app import AppRoute, Guard, HttpApp, bearer_check, health_routes, model_routes
from pdlaunch.http.connections import HttpRunner, fit
from pdlaunch.http.errors import json_response
from pdlaunch.http.headers import ignored_fields_header
from pdlaunch.http.kv_feed import KV_EVENTS_PATH
from pdlaunch.http.lifecycle import Supervised
from pdlaunch.http.limits import LARGE_TEXT_BYTES, work_at_input
from pdlaunch.machine.network import LISTEN_BACKLOG
from pdlaunch.protocol.certificates import server_context
from pdlaunch.protocol.control import Address, Drained, Progress, Ready, Registry
from pdlaunch.protocol.engine import CheckIntegrity
from pdlaunch.protocol.openai.body import read_json_object
from pdlaunch.protocol.openai.requests import ChatCompletionRequest, CompletionRequest
from pdlaunch.protocol.openai.responses import ModelCard
from pdlaunch.protocol.process.engine_ports import bind_to_share

RANK_CHECK_TIMEOUT_S = 30.0
OPEN_PATHS = ("/health", "/ping")  # need no key

Endpoint = Callable[[EngineService, web.Request], Awaitable[web.StreamResponse]]


def make_app(service: EngineService, *, keys: Collection[str]) -> web.Application:
    """Return the application. All paths but ``OPEN_PATHS`` need one of ``keys`` as bearer token."""
    spec = service.spec

    def route(method: str, path: str, endpoint: Endpoint) -> AppRoute:
        return AppRoute(method, path, partial(endpoint, service))

    def cards() -> list[ModelCard]:
        name, longest = spec.served_model_name, service.max_model_len
        return [ModelCard(id=name, root=spec.model_dir, max_model_len=longest)]

    routes = [
        route("POST", "/v1/completions", partial(generate, kind=CompletionRequest)),
        route("POST", "/v1/chat/completions", partial(generate, kind=ChatCompletionRequest)),
        *model_routes(cards),
        route("POST", "/tokenize", partial(_convert, convert=ServedModel.tokenize)),
        route("POST", "/detokenize", partial(_convert, convert=ServedModel.detokenize)),
        *health_routes(partial(_health, service)),
        route("GET", "/metrics", _metrics),
        route("POST", "/pdlaunch/release", _release),
        route("GET", "/pdlaunch/integrity", _integrity),
        AppRoute("POST", "/sleep", service.sleep.fall_asleep),
        AppRoute("POST", "/wake_up", service.sleep.wake_up),
        AppRoute("GET", "/is_sleeping", service.sleep.is_sleeping),
    ]
    return HttpApp(
        [
            *(_counted(each, service) for each in routes),
            # Not counted as a request: a stream lasts as long as its router.
            AppRoute("GET", KV_EVENTS_PATH, service.kv_feed.send),
        ],
        guard=Guard(spec.bind_address, allowed_hosts=(*spec.allowed_hosts, spec.advertise_address)),
        check_key=bearer_check(
            keys,
            message="engines serve the launch's router; other clients need engine_api_key as "
            "bearer token, if it is set",
            code="invalid_api_key",
        ),
        open_paths=OPEN_PATHS,
        metrics=service.metrics.requests,
        max_body_bytes=service.bodies.max_body_bytes,
    ).app


def _counted(route: AppRoute, service: EngineService) -> AppRoute:
    async def handle(http: web.Request) -> web.StreamResponse:
        with service.metrics.requests.in_flight.track_inprogress():
            return await route.handler(http)

    return route._replace(handler=handle)


async def _convert(
    service: EngineService,
    http: web.Request,
    convert: Callable[[ServedModel, bytes], tuple[dict[str, Any], tuple[str, ...]]],
) -> web.Response:
    """Convert text to token ids or back. Takes a place, like a request that generates."""
    with service.admission.admit():
        async with service.deadlines.start()(), service.bodies.read(http) as raw:
            answer, ignored_fields = await work_at_input(
                len(raw) >= LARGE_TEXT_BYTES, partial(convert, service.model, raw)
            )
            body = msgspec.json.encode(answer)
    headers = ignored_fields_header(ignored_fields)
    return web.Response(body=body, content_type="application/json", headers=headers)


async def _health(service: EngineService, _: web.Request) -> web.Response:
    service.check_health()
    return json_response({"status": "ok"})


async def _metrics(service: EngineService, _: web.Request) -> web.Response:
    await service.read_stats()
    return web.Response(
        body=generate_latest(service.metrics.registry),
        headers={"Content-Type": CONTENT_TYPE_LATEST},
    )


async def _release(service: EngineService, http: web.Request) -> web.Response:
    """End the lease of a remote prefill, named by its HopId or by its remote_request_id."""
    async with service.bodies.read(http) as raw:
        name = read_json_object(raw).get("request_id")
    if not isinstance(name, str):
        raise RequestError("request_id must be a string", param="request_id")
    request_id = service.leases.pop(name, None)
    if request_id is not None:
        service.link.abort(request_id)
    return json_response({"released": request_id is not None})


async def _integrity(service: EngineService, _: web.Request) -> web.Response:
    """Let rank 0 check the owners of all KV blocks. The status is 200 even if the check fails."""
    try:
        async with asyncio.timeout(RANK_CHECK_TIMEOUT_S):
            report = await service.link.call(CheckIntegrity())
    except TimeoutError:
        raise OverloadedError(
            "rank 0 did not answer in time", status=503, code="engine_stalled"
        ) from None
    stats = msgspec.structs.asdict(report.stats)
    stats |= stats.pop("counts")
    return json_response({"ok": report.error is None, "error": report.error, "stats": stats})


_log = logging.getLogger(__name__)

# Time limit for a connection that reads none of its answer. It is longer than a router's limit,
# because a router waits for its own client in turn.
ROUTER_READ_TIMEOUT_S = 60.0


class ServerProcess:
    """Runs one engine's HTTP server. Create it in a running event loop, and call ``run`` once."""

    def __init__(self, supervised: Supervised) -> None:
        self._supervised = supervised
        self._spec: EngineSpec = supervised.bootstrap.engine()
        self._service = EngineService(self._spec, CollectorRegistry())
        self._service.sleep.announce = supervised.send
        # Incarnation and endpoint of the rank 0 that the link leads to.
        self._rank: tuple[int, str] | None = None

    async def run(self) -> None:
        """Serve until Stop or a signal. Raises PdlaunchError when the start fails."""
        supervised, bootstrap = self._supervised, self._supervised.bootstrap
        keys = [bootstrap.keys.http_token, bootstrap.engine_api_key]
        is_local, certificate = is_loopback(self._spec.bind_address), bootstrap.keys.certificate
        runner = HttpRunner(
            make_app(self._service, keys=[key for key in keys if key is not None]),
            max_connections=fit(self._spec.limits.max_connections),
            tls=None if is_local or certificate is None else server_context(certificate),
        )
        try:
            await runner.setup()
            supervised.register(Address(http=await self._bind(runner)))
            supervised.spawn(self._start())
            await self._supervised.obey(self._find_rank, self._drain)
        finally:
            await self._service.use_link(None)
            self._service.kv_feed.close()
            await runner.cleanup()

    async def _bind(self, runner: HttpRunner) -> str:
        host, port = self._spec.bind_address, self._spec.http_port
        bootstrap = self._supervised.bootstrap
        certificate, is_local = bootstrap.keys.certificate, is_loopback(host)
        if not is_local and certificate is None:
            raise StartupError(f"{self._spec.name} cannot listen on {host} without a certificate")
        try:
            site: web.BaseSite
            if is_local or certificate is None:
                bound = bind_to_share(host, port, is_kept=bootstrap.port_is_kept)
                site = web.SockSite(runner, bound, backlog=LISTEN_BACKLOG)
            else:
                site = web.TCPSite(runner, host, port, backlog=LISTEN_BACKLOG)
            await site.start()
            runner.drop_stalled_readers(ROUTER_READ_TIMEOUT_S)
        except OSError as error:
            raise StartupError(
                f"{self._spec.name} cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}"
            ) from None
        scheme = "http" if is_local else "https"
        return url_of(scheme, self._spec.advertise_address, runner.addresses[0][1])

    async def _start(self) -> None:
        """Load the model's text side, wait for rank 0's Welcome, send Ready."""
        send = self._supervised.send
        try:
            loaded = await asyncio.to_thread(
                load_served_model, self._spec, lambda text: send(Progress(text=text))
            )
            refuse_changes(self._supervised.bootstrap.pinned or loaded.files, loaded.files)
            self._service.loaded = loaded
        except PdlaunchError as error:
            self._supervised.inbox.put_nowait(error)
            return
        except Exception as error:
            _log.exception("loading failed")
            self._supervised.inbox.put_nowait(StartupError(f"loading failed: {error!r}"))
            return
        send(Progress(text="waiting for rank 0"))
        await self._service.welcomed.wait()
        send(Ready(model=loaded.files))

    async def _find_rank(self, registry: Registry) -> None:
        """Link to this engine's rank 0: a new link for each incarnation, no link without rank 0."""
        name = f"{self._spec.name}/rank-0"
        rank = next(
            (
                (entry.incarnation, entry.address.requests)
                for entry in registry.entries
                if entry.name == name and entry.address.requests
            ),
            None,
        )
        # A registry arrives with each change of any process; most changes are not of this rank.
        if rank == self._rank:
            return
        if self._rank is not None:
            _log.warning("rank 0 was %s, now %s", self._rank, rank or "lost")
        self._rank = rank
        link = None
        if rank is not None:
            link = RankLink(
                self._supervised.context,
                rank[1],
                identity=self._supervised.bootstrap.name,
                on_message=self._service.receive,
            )
        await self._service.use_link(link)

    async def _drain(self, timeout_s: float) -> None:
        await self._service.drain(timeout_s)
        self._supervised.send(Drained())
