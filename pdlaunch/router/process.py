"""The router as a child of the supervisor: listens, registers, follows the registry, drains and
stops.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from aiohttp import web

from pdlaunch.config.http_names import local_url
from pdlaunch.errors import PdlaunchError
from pdlaunch.http.connections import HttpRunner, fit_connections, fit_requests
from pdlaunch.process.bootstrap import LISTEN_BACKLOG, Bootstrap, RouterSpec
from pdlaunch.process.control_client import ControlClient
from pdlaunch.process.heartbeat import Heartbeat
from pdlaunch.process.run_dirs import ADMIN_SOCKET, LaunchCard
from pdlaunch.protocol.control import (
    Address,
    Drain,
    Drained,
    Failed,
    FromSupervisor,
    Ready,
    Register,
    Registry,
    Restarting,
    Stop,
    Suspects,
)
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.router.admin_socket import listen_at_admin_socket
from pdlaunch.router.app import RouterApp
from pdlaunch.router.engine_client import EngineClient, EngineTimeouts
from pdlaunch.router.hops import Hops, RecoverySettings
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.supervisor_link import SupervisorLink

logger = logging.getLogger(__name__)

READER_TIMEOUT_S = 20.0
"""For a client that takes no byte of its answer."""
SHUTDOWN_TIMEOUT_S = 1.0
"""For handlers to end when the router stops; draining comes before."""


class RouterProcess:
    """Owns everything of the process; made outside the event loop, ``run`` once inside."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        assert bootstrap.router is not None
        self._bootstrap = bootstrap
        self._spec: RouterSpec = bootstrap.router
        self._inbox: asyncio.Queue[FromSupervisor] = asyncio.Queue()
        self._draining: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Serve until Stop or SIGTERM; the exit code."""
        loop = asyncio.get_running_loop()
        context = SecureContext(self._bootstrap.keys)
        control = ControlClient(
            context,
            self._bootstrap.control,
            self._bootstrap.name,
            lambda message: _deliver(loop, self._inbox, message),
        )
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._inbox.put_nowait, Stop())
        try:
            await self._serve(control)
        except PdlaunchError as error:
            logger.error("router failed: %s", error)
            control.send(Failed(error=str(error)))
            return 1
        except Exception as error:
            logger.exception("router failed")
            control.send(Failed(error=f"{type(error).__name__}: {error}"))
            return 1
        finally:
            control.close()
            context.close()
        return 0

    async def _serve(self, control: ControlClient) -> None:
        spec = _fit(self._spec)
        client = EngineClient(self._bootstrap.keys.http_token, EngineTimeouts())
        metrics = RouterMetrics(spec.served_model_name)
        hops = Hops(EnginePool(time.monotonic), client, metrics, RecoverySettings())
        link = SupervisorLink(control.send)
        router = RouterApp(spec, hops, link)
        runner = HttpRunner(
            router.app, max_connections=spec.max_connections, shutdown_timeout_s=SHUTDOWN_TIMEOUT_S
        )
        runners: list[web.AppRunner] = [runner]
        await runner.setup()
        heartbeat = asyncio.create_task(Heartbeat(control.send, self._bootstrap.heartbeat_s).run())
        try:
            url = local_url(spec.host, spec.port)
            control.send(
                Register(
                    name=self._bootstrap.name,
                    incarnation=self._bootstrap.incarnation,
                    pid=os.getpid(),
                    address=Address(http=url),
                )
            )
            await self._first_registry(hops)
            runners.append(await self._take_commands(router, url))
            await listen(runner, spec.listeners)
            runner.drop_stalled_readers(READER_TIMEOUT_S)
            control.send(Ready(info={"url": url}))
            await self._follow(control, hops, router, link)
        finally:
            heartbeat.cancel()
            await asyncio.gather(*(each.cleanup() for each in runners))
            await hops.close()

    async def _first_registry(self, hops: Hops) -> None:
        """Know the engines before the first client is heard: those who waited for this router shall
        not hear that all starts.
        """
        match message := await self._inbox.get():
            case Registry() as registry:
                hops.update(registry)
            case _:
                self._inbox.put_nowait(message)

    async def _take_commands(self, router: RouterApp, url: str) -> web.AppRunner:
        """Listen at the launch's admin socket, and leave the card by which commands find it."""
        run_dir = Path(self._bootstrap.run_dir)
        runner = await listen_at_admin_socket(
            router.app, run_dir / ADMIN_SOCKET, shutdown_timeout_s=SHUTDOWN_TIMEOUT_S
        )
        LaunchCard(launch_id=self._bootstrap.launch_id, url=url).write(run_dir)
        return runner

    async def _follow(
        self, control: ControlClient, hops: Hops, router: RouterApp, link: SupervisorLink
    ) -> None:
        """Do what the supervisor says until it says Stop; draining does not hold up the
        registry.
        """
        while True:
            match await self._inbox.get():
                case Registry() as registry:
                    hops.update(registry)
                case Restarting() as answer:
                    link.answered(answer)
                case Suspects() as suspects:
                    hops.suspects.take(suspects)
                case Drain(timeout_s=timeout_s):
                    self._draining = asyncio.ensure_future(_drain(router, control, timeout_s))
                case Stop():
                    if self._draining is not None:
                        self._draining.cancel()
                    await router.close()
                    return


def _fit(spec: RouterSpec) -> RouterSpec:
    """The limits that the descriptors of this process allow."""
    requests = fit_requests(spec.max_queued_requests)
    connections = fit_connections(spec.max_connections, num_forwarded=requests)
    if (requests, connections) != (spec.max_queued_requests, spec.max_connections):
        logger.warning(
            "few descriptors (ulimit -n): at most %d requests and %d connections at a time",
            requests,
            connections,
        )
    return msgspec.structs.replace(spec, max_queued_requests=requests, max_connections=connections)


async def listen(runner: web.AppRunner, listeners: Sequence[int]) -> None:
    """Accept at sockets of the supervisor: what connected while no router ran has waited there."""
    for descriptor in listeners:
        listener = socket.socket(fileno=descriptor)
        listener.set_inheritable(False)
        await web.SockSite(runner, listener, backlog=LISTEN_BACKLOG).start()


async def _drain(router: RouterApp, control: ControlClient, timeout_s: float) -> None:
    """Let what runs finish; what still runs then is told that the router leaves."""
    if not await router.admission.drain(timeout_s):
        logger.warning(
            "%d requests still run after %g s of draining", router.admission.in_flight, timeout_s
        )
        await router.close()
    control.send(Drained())


def _deliver(
    loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[FromSupervisor], message: FromSupervisor
) -> None:
    """From the control thread into the loop; what comes after the loop's end is of no use."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(inbox.put_nowait, message)
