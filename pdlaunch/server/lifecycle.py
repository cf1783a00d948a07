"""The server process from its start to its end, as the supervisor steers it.

::

    bind HTTP -> Register -> load the model's text side ──────┬─> Ready -> serve -> Drain -> Stop
                   Registry -> rank 0 found -> Hello, Welcome ─┘
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Coroutine

from aiohttp import web
from prometheus_client import CollectorRegistry

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.http_names import local_url
from pdlaunch.errors import PdlaunchError, StartupError
from pdlaunch.http.connections import HttpRunner, fit_connections
from pdlaunch.process.bootstrap import Bootstrap
from pdlaunch.process.control_client import ControlClient
from pdlaunch.process.heartbeat import Heartbeat
from pdlaunch.protocol.control import (
    Address,
    Capabilities,
    Drain,
    Drained,
    Failed,
    FromSupervisor,
    Progress,
    Ready,
    Register,
    Registry,
    Stop,
)
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.server.app import make_app
from pdlaunch.server.engine_service import EngineService
from pdlaunch.server.rank_link import RankLink
from pdlaunch.server.served_model import load_served_model

_log = logging.getLogger(__name__)

READER_TIMEOUT_S = 60.0
"""For who takes no byte of an answer; longer than a router's, which waits for its own client in
turn.
"""
SHUTDOWN_TIMEOUT_S = 1.0
"""Handlers that still run after Stop get this long; they were drained before."""


class ServerProcess:
    """One engine's HTTP server under a supervisor; made inside a running event loop."""

    def __init__(self, bootstrap: Bootstrap, context: SecureContext) -> None:
        """``context`` stays the caller's."""
        loop = asyncio.get_running_loop()

        def on_message(message: FromSupervisor) -> None:
            loop.call_soon_threadsafe(self._inbox.put_nowait, message)

        self._bootstrap = bootstrap
        self._spec: EngineSpec = bootstrap.engine()
        self._context = context
        self._service = EngineService(self._spec, CollectorRegistry())
        self._inbox: asyncio.Queue[FromSupervisor | PdlaunchError] = asyncio.Queue()
        self._control = ControlClient(context, bootstrap.control, bootstrap.name, on_message)
        self._service.sleep.announce = self._control.send
        self._rank: tuple[int, str] | None = None
        """Incarnation and endpoint of the rank 0 that the link leads to."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until Stop or a signal. Raises PdlaunchError when the start fails, after the
        supervisor was told.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._inbox.put_nowait, Stop())
        keys = [self._bootstrap.keys.http_token, self._bootstrap.engine_api_key]
        runner = HttpRunner(
            make_app(self._service, keys=[key for key in keys if key is not None]),
            max_connections=fit_connections(self._spec.limits.max_connections),
            shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        )
        try:
            await runner.setup()
            self._register(await self._bind(runner))
            self._spawn(Heartbeat(self._control.send, self._bootstrap.heartbeat_s).run())
            self._spawn(self._start())
            await self._obey()
        except PdlaunchError as error:
            self._control.send(Failed(error=str(error)))
            raise
        finally:
            for task in self._tasks:
                task.cancel()
            await self._service.use_link(None)
            await runner.cleanup()
            self._control.close()

    async def _bind(self, runner: HttpRunner) -> str:
        """Listen; returns the URL. Raises StartupError."""
        host, port = self._spec.bind_address, self._spec.http_port
        try:
            await web.TCPSite(runner, host, port).start()
            runner.drop_stalled_readers(READER_TIMEOUT_S)
        except OSError as error:
            raise StartupError(
                f"{self._spec.name} cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}"
            ) from None
        return local_url(host, runner.addresses[0][1])

    def _register(self, url: str) -> None:
        self._control.send(
            Register(
                name=self._bootstrap.name,
                incarnation=self._bootstrap.incarnation,
                pid=os.getpid(),
                address=Address(http=url),
                capabilities=Capabilities(
                    verifies=self._spec.kv_transfer.verify,
                    resumes=True,
                    gives_first_token=True,
                    awaits_lease=True,
                ),
            )
        )

    async def _start(self) -> None:
        """Load, wait for the rank, say Ready."""
        try:
            self._service.loaded = await asyncio.to_thread(
                load_served_model, self._spec, lambda text: self._control.send(Progress(text=text))
            )
        except PdlaunchError as error:
            self._inbox.put_nowait(error)
            return
        except Exception as error:
            _log.exception("loading failed")
            self._inbox.put_nowait(StartupError(f"loading failed: {error!r}"))
            return
        self._control.send(Progress(text="waiting for rank 0"))
        await self._service.welcomed.wait()
        self._control.send(Ready())

    async def _obey(self) -> None:
        """What the supervisor says, until Stop. Raises the error of a failed start."""
        while True:
            match await self._inbox.get():
                case Registry() as registry:
                    await self._find_rank(registry)
                case Drain(timeout_s=timeout_s):
                    self._spawn(self._drain(timeout_s))
                case Stop():
                    return
                case PdlaunchError() as error:
                    raise error

    async def _find_rank(self, registry: Registry) -> None:
        """Link to the rank 0 of this engine; a new incarnation gets a new link, a lost one none."""
        name = f"{self._spec.name}/rank-0"
        found = next(
            (entry for entry in registry.entries if entry.name == name and entry.address.requests),
            None,
        )
        rank = None if found is None else (found.incarnation, found.address.requests)
        if rank == self._rank:
            return
        if self._rank is not None:
            _log.warning("rank 0 was %s, now %s", self._rank, rank or "lost")
        self._rank = rank
        await self._service.use_link(None if rank is None else self._new_link(rank[1]))

    def _new_link(self, endpoint: str) -> RankLink:
        return RankLink(
            self._context,
            endpoint,
            identity=self._bootstrap.name,
            server_incarnation=self._bootstrap.incarnation,
            on_welcome=self._service.on_welcome,
            on_stats=self._service.on_stats,
            on_sleep=self._service.sleep.on_reply,
        )

    async def _drain(self, timeout_s: float) -> None:
        await self._service.admission.drain(timeout_s)
        self._control.send(Drained())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
