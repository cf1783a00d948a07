"""Runs the server process from its start to its end, as the supervisor steers it.

::

    bind HTTP -> Register -> load the model's text side ──────┬─> Ready -> serve -> Drain -> Stop
                   Registry -> rank 0 found -> Hello, Welcome ─┘
"""

from __future__ import annotations

import asyncio
import logging
import os

from aiohttp import web
from prometheus_client import CollectorRegistry

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.http_names import is_loopback, url_of
from pdlaunch.engine.server.app import make_app
from pdlaunch.engine.server.engine_service import EngineService
from pdlaunch.engine.server.rank_link import RankLink
from pdlaunch.engine.server.served_model import load_served_model
from pdlaunch.errors import PdlaunchError, StartupError
from pdlaunch.http.connections import HttpRunner, fit_connections
from pdlaunch.http.lifecycle import SHUTDOWN_TIMEOUT_S, Supervised
from pdlaunch.protocol.certificates import server_context
from pdlaunch.protocol.control import (
    Answered,
    Drain,
    Drained,
    EngineIdle,
    Happened,
    Progress,
    Ready,
    Registry,
    Stop,
    Suspects,
)
from pdlaunch.protocol.process.bootstrap import LISTEN_BACKLOG
from pdlaunch.protocol.process.engine_ports import bind_to_share

_log = logging.getLogger(__name__)

ROUTER_READ_TIMEOUT_S = 60.0
"""Seconds for which a connection may take no byte of its answer. It is longer than a router's
limit, because a router waits for its own client in turn.
"""


class ServerProcess:
    """Runs one engine's HTTP server; made inside a running event loop, ``run`` once."""

    def __init__(self, supervised: Supervised) -> None:
        self._supervised = supervised
        self._spec: EngineSpec = supervised.bootstrap.engine()
        self._service = EngineService(self._spec, CollectorRegistry())
        self._service.sleep.announce = supervised.send
        self._rank: tuple[int, str] | None = None
        """Incarnation and endpoint of the rank 0 that the link leads to."""

    async def run(self) -> None:
        """Serve until Stop or a signal. Raises PdlaunchError when the start fails."""
        supervised, bootstrap = self._supervised, self._supervised.bootstrap
        keys = [bootstrap.keys.http_token, bootstrap.engine_api_key]
        runner = HttpRunner(
            make_app(self._service, keys=[key for key in keys if key is not None]),
            max_connections=fit_connections(self._spec.limits.max_connections),
            shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        )
        try:
            await runner.setup()
            supervised.register(await self._bind(runner))
            supervised.spawn(self._start())
            await self._obey()
        finally:
            await self._service.use_link(None)
            await runner.cleanup()

    async def _bind(self, runner: HttpRunner) -> str:
        """Listen and return the URL: of HTTP on this host alone, of TLS to others. Raises
        StartupError.
        """
        host, port = self._spec.bind_address, self._spec.http_port
        bootstrap = self._supervised.bootstrap
        certificate, is_local = bootstrap.keys.certificate, is_loopback(host)
        if not is_local and certificate is None:
            raise StartupError(f"{self._spec.name} has no certificate to listen on {host} with")
        try:
            site: web.BaseSite
            if is_local or certificate is None:
                bound = bind_to_share(host, port, is_kept=bootstrap.port_is_kept)
                site = web.SockSite(runner, bound, backlog=LISTEN_BACKLOG)
            else:
                tls = server_context(certificate)
                site = web.TCPSite(runner, host, port, ssl_context=tls, backlog=LISTEN_BACKLOG)
            await site.start()
            runner.drop_stalled_readers(ROUTER_READ_TIMEOUT_S)
        except OSError as error:
            raise StartupError(
                f"{self._spec.name} cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}"
            ) from None
        scheme = "http" if is_local else "https"
        return url_of(scheme, self._spec.advertise_address, runner.addresses[0][1])

    async def _start(self) -> None:
        """Load the text side, wait for rank 0, say Ready."""
        send = self._supervised.send
        try:
            loaded = self._service.loaded = await asyncio.to_thread(
                load_served_model, self._spec, lambda text: send(Progress(text=text))
            )
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

    async def _obey(self) -> None:
        """Do what the supervisor says until Stop. Raises the error of a failed start."""
        while True:
            match await self._supervised.inbox.get():
                case Registry() as registry:
                    await self._find_rank(registry)
                case Drain(timeout_s=timeout_s):
                    self._supervised.spawn(self._drain(timeout_s))
                case Stop():
                    return
                case PdlaunchError() as error:
                    raise error
                case Suspects() | Answered() | EngineIdle() | Happened():
                    pass  # said to routers alone

    async def _find_rank(self, registry: Registry) -> None:
        """Link to this engine's rank 0; a new incarnation gets a new link, a lost one none."""
        name = f"{self._spec.name}/rank-0"
        rank = next(
            (
                (entry.incarnation, entry.address.requests)
                for entry in registry.entries
                if entry.name == name and entry.address.requests
            ),
            None,
        )
        # Registries come for every change of any process; most say nothing of this rank.
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
                hear=self._service.hear,
            )
        await self._service.use_link(link)

    async def _drain(self, timeout_s: float) -> None:
        await self._service.admission.drain(timeout_s)
        self._supervised.send(Drained())
