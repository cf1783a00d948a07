"""Runs the router under the supervisor: it registers, listens, follows the registry, drains."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from aiohttp import web

from pdlaunch.config.http_names import local_url
from pdlaunch.errors import PdlaunchError
from pdlaunch.http.connections import HttpRunner, fit_connections, fit_requests
from pdlaunch.http.lifecycle import SHUTDOWN_TIMEOUT_S, Supervised
from pdlaunch.protocol.certificates import client_context
from pdlaunch.protocol.changes import Answered, AwaitIdle, EngineIdle
from pdlaunch.protocol.control import (
    Drain,
    Drained,
    Happened,
    Ready,
    Registry,
    Restarting,
    ServedRequest,
    Stop,
    Suspects,
)
from pdlaunch.protocol.process.bootstrap import LISTEN_BACKLOG, RouterSpec
from pdlaunch.protocol.process.run_dirs import ADMIN_SOCKET, LaunchCard
from pdlaunch.router.admin import listen_at_admin_socket
from pdlaunch.router.app import RouterApp
from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.router.engine_client import EngineClient, EngineTimeouts, keys_of_launch
from pdlaunch.router.membership import AnnouncedMembership, Membership
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.policy import Policy
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.state import RecoverySettings, RouterState
from pdlaunch.router.supervisor_link import SupervisorLink

logger = logging.getLogger(__name__)

CLIENT_READ_TIMEOUT_S = 20.0
"""Seconds for which a client may take no byte of its answer."""


_NEW_OBJECTS = 10_000
"""Objects that are made, and not freed, before garbage is searched for among them."""


class RouterProcess:
    """Owns everything of the process; made inside a running event loop, ``run`` once."""

    def __init__(self, supervised: Supervised) -> None:
        assert supervised.bootstrap.router is not None
        spec = fit(supervised.bootstrap.router)
        certificate = supervised.bootstrap.keys.certificate
        self._supervised = supervised
        self._spec = spec
        self._url = local_url(spec.host, spec.port)
        self._membership = AnnouncedMembership()
        self._state = RouterState(
            EnginePool(time.monotonic, new_policy(spec)),
            EngineClient(
                keys_of_launch(
                    supervised.bootstrap.keys.http_token, supervised.bootstrap.engine_api_key
                ),
                EngineTimeouts(),
                None if certificate is None else client_context(certificate),
            ),
            RouterMetrics(spec.served_model_name),
            RecoverySettings(),
            doubt=supervised.send,
        )
        self._link = SupervisorLink(supervised.send)
        self._router = RouterApp(
            spec,
            self._state,
            self._link,
            show_request=self._show_request if spec.log_requests else None,
        )
        self._draining: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until Stop or a signal."""
        runner = HttpRunner(
            self._router.app,
            max_connections=self._spec.max_connections,
            shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        )
        runners: list[web.AppRunner] = [runner]
        await runner.setup()
        self._supervised.register(self._url)
        self._supervised.spawn(follow(self._membership, self._state))
        self._supervised.spawn(self._router.view.run())
        obeying = asyncio.ensure_future(self._obey())
        try:
            # Clients who waited for this router are not to hear that the deployment starts.
            await _first([obeying, asyncio.ensure_future(self._state.knows_engines())])
            if not obeying.done():
                runners.append(await self._take_commands())
                await listen(runner, self._spec.listeners)
                runner.drop_stalled_readers(CLIENT_READ_TIMEOUT_S)
                settle_memory()
                self._supervised.send(Ready(info={"url": self._url}))
            await obeying
        finally:
            obeying.cancel()
            await asyncio.gather(*(each.cleanup() for each in runners))
            await self._state.close()

    def _show_request(self, line: str) -> None:
        self._supervised.send(ServedRequest(line=line))

    async def _take_commands(self) -> web.AppRunner:
        """Listen at the launch's admin socket, and leave the card by which commands find it."""
        bootstrap = self._supervised.bootstrap
        run_dir = Path(bootstrap.run_dir)
        runner = await listen_at_admin_socket(
            self._router.app, run_dir / ADMIN_SOCKET, shutdown_timeout_s=SHUTDOWN_TIMEOUT_S
        )
        LaunchCard(launch_id=bootstrap.launch_id, url=self._url).write(run_dir)
        return runner

    async def _obey(self) -> None:
        """Do what the supervisor says until Stop; draining does not hold up the rest."""
        while True:
            match await self._supervised.inbox.get():
                case Registry() as registry:
                    self._membership.announce(registry)
                case Happened() as told if told.prefill:
                    self._state.pair_failed(told.prefill, told.decode, told.text, told.ago_s)
                case Happened(text=text, ago_s=ago_s):
                    self._state.events.add("launch", "", text, is_bad=False, ago_s=ago_s)
                case Restarting() | Answered() as answer:
                    self._link.answered(answer)
                case AwaitIdle(engine=engine):
                    self._supervised.spawn(self._tell_idle(engine))
                case Suspects() as suspects:
                    self._state.suspects.take(suspects)
                case Drain(timeout_s=timeout_s):
                    self._draining = self._supervised.spawn(self._drain(timeout_s))
                case Stop():
                    if self._draining is not None:
                        self._draining.cancel()
                    await self._router.close()
                    return
                case PdlaunchError() as error:
                    raise error

    async def _tell_idle(self, engine: str) -> None:
        """Tell the supervisor once nothing is left at an engine, nor to be read from it."""
        await self._state.pool.until_idle(engine)
        self._supervised.send(EngineIdle(engine=engine))

    async def _drain(self, timeout_s: float) -> None:
        """Let what runs finish; what still runs then is told that the router leaves."""
        admission = self._router.admission
        if not await admission.drain(timeout_s):
            logger.warning(
                "%d requests still run after %g s of draining", admission.in_flight, timeout_s
            )
            await self._router.close()
        self._supervised.send(Drained())


def new_policy(spec: RouterSpec) -> Policy:
    """Return the policy that keeps to the settings of a router.

    It is one class for both words of ``routing.policy``: with ``pairs`` its costs choose nothing,
    and only refuse what comes too late.
    """
    return LeastCost(
        prefers_pairs=not spec.by_cost,
        max_ttft_s=None if spec.max_ttft_ms is None else spec.max_ttft_ms / 1000,
        max_itl_s=None if spec.max_itl_ms is None else spec.max_itl_ms / 1000,
    )


async def listen(runner: web.AppRunner, listeners: Sequence[int]) -> None:
    """Accept at sockets of the supervisor: what connected while no router ran has waited there."""
    for descriptor in listeners:
        listener = socket.socket(fileno=descriptor)
        listener.set_inheritable(False)
        await web.SockSite(runner, listener, backlog=LISTEN_BACKLOG).start()


def settle_memory() -> None:
    """Keep what the process holds once it is ready from the collector of garbage: requests make no
    garbage of it, and each full search of it would hold up all streams. Requests make hardly any
    garbage at all, so it is searched for less often, too.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS)


def fit(spec: RouterSpec) -> RouterSpec:
    """Return the limits that the descriptors of this process allow."""
    requests = fit_requests(spec.max_queued_requests)
    connections = fit_connections(spec.max_connections, num_forwarded=requests)
    if (requests, connections) != (spec.max_queued_requests, spec.max_connections):
        logger.warning(
            "few descriptors (ulimit -n): at most %d requests and %d connections at a time",
            requests,
            connections,
        )
    return msgspec.structs.replace(spec, max_queued_requests=requests, max_connections=connections)


async def follow(membership: Membership, state: RouterState) -> None:
    """Show the state each version of the registry, until cancelled."""
    async for registry in membership.versions():
        state.update(registry)


async def _first(tasks: Sequence[asyncio.Future[None]]) -> None:
    """Return when one of them has ended; the others go on."""
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
