"""Runs a router alone, in front of engines that somebody else started; nobody supervises it.

It does for itself what the supervisor does for a launch's router: it watches the engines, drains
at the first signal and stops at the second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from pdlaunch.config.external import DNS
from pdlaunch.config.http_names import local_url
from pdlaunch.http.connections import HttpRunner
from pdlaunch.http.lifecycle import SHUTDOWN_TIMEOUT_S
from pdlaunch.http.limits import Admission
from pdlaunch.protocol.changes import Answered, ChangeEngines, SetDrained
from pdlaunch.protocol.control import Restart, Restarting
from pdlaunch.protocol.process.bootstrap import RouterSpec
from pdlaunch.protocol.process.run_dirs import ADMIN_SOCKET, LaunchCard
from pdlaunch.router.admin import listen_at_admin_socket
from pdlaunch.router.app import RouterApp
from pdlaunch.router.engine_client import EngineClient, EngineTimeouts
from pdlaunch.router.membership_sources import DnsSource, FileSource
from pdlaunch.router.membership_watch import WatchedMembership
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.process import (
    CLIENT_READ_TIMEOUT_S,
    fit,
    follow,
    listen,
    new_policy,
    settle_memory,
)
from pdlaunch.router.state import RecoverySettings, RouterState
from pdlaunch.router.supervisor_link import Question, SupervisorLink
from pdlaunch.router.watched_engine import Member, WatchSettings

_logger = logging.getLogger(__name__)

TELL_LEFT_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class AloneSpec:
    """Holds what a router alone needs."""

    router: RouterSpec
    watch: WatchSettings
    engines: Sequence[Member]
    engines_file: Path | None
    run_dir: Path
    launch_id: str


class LoneRouter:
    """Owns everything of the process; made inside a running event loop, ``run`` once."""

    def __init__(self, spec: AloneSpec) -> None:
        self._spec = spec
        self._router_spec = router = fit(spec.router)
        pool = EnginePool(time.monotonic, new_policy(router))
        metrics = RouterMetrics(router.served_model_name)
        self._membership = WatchedMembership(
            spec.watch,
            lambda: pool.engines,
            metrics.sent_canary,
            lambda *found: self._state.recomputed(*found),
        )
        self._state = RouterState(
            pool,
            EngineClient(self._membership.key_of, EngineTimeouts()),
            metrics,
            RecoverySettings(),
            doubt=self._membership.suspect,
        )
        self._link = SupervisorLink(self._answer)
        self._router = RouterApp(router, self._state, self._link, self._membership)
        self._signals: asyncio.Queue[None] = asyncio.Queue()

    async def run(self) -> None:
        """Serve until a signal, drain until the time is up or the next signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._signals.put_nowait, None)
        spec = self._router_spec
        runner = HttpRunner(
            self._router.app,
            max_connections=spec.max_connections,
            shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        )
        runners: list[web.AppRunner] = [runner]
        tasks: list[asyncio.Task[None]] = []
        try:
            await runner.setup()
            tasks += self._follow_engines()
            await self._state.knows_engines()
            runners.append(await self._take_commands())
            await listen(runner, spec.listeners)
            runner.drop_stalled_readers(CLIENT_READ_TIMEOUT_S)
            settle_memory()
            _logger.info(
                "listening at %s, for commands at %s",
                local_url(spec.host, spec.port),
                self._spec.run_dir / ADMIN_SOCKET,
            )
            await self._signals.get()
            await self._drain()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(each.cleanup() for each in runners))
            await self._membership.close()
            await self._state.close()

    def stop(self) -> None:
        """Do what a signal does."""
        self._signals.put_nowait(None)

    def _follow_engines(self) -> list[asyncio.Task[None]]:
        spec, drain_s = self._spec, self._router_spec.drain_timeout_s
        works = [follow(self._membership, self._state), self._router.view.run()]
        for member in spec.engines:
            if member.url.startswith(DNS):
                works.append(DnsSource(member, self._membership, drain_s).run())
            else:
                self._membership.add(member, "config", is_trusted=True)
        if spec.engines_file is not None:
            source = FileSource(spec.engines_file, self._membership, spec.watch.kind, drain_s)
            works.append(source.run())
        self._membership.begin()
        return [asyncio.ensure_future(work) for work in works]

    async def _take_commands(self) -> web.AppRunner:
        run_dir = self._spec.run_dir
        runner = await listen_at_admin_socket(
            self._router.app, run_dir / ADMIN_SOCKET, shutdown_timeout_s=SHUTDOWN_TIMEOUT_S
        )
        url = local_url(self._router_spec.host, self._router_spec.port)
        LaunchCard(launch_id=self._spec.launch_id, url=url).write(run_dir)
        return runner

    async def _drain(self) -> None:
        timeout_s = self._router_spec.drain_timeout_s
        admission = self._router.admission
        telling = asyncio.ensure_future(_tell_left(admission, timeout_s))
        drained = asyncio.ensure_future(admission.drain(timeout_s))
        again = asyncio.ensure_future(self._signals.get())
        await asyncio.wait([drained, again], return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, again, telling):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._router.close()

    def _answer(self, asked: Question) -> None:
        number = asked.question
        match asked:
            case Restart(name=name):
                error = f"{name} runs already: whoever started it restarts it"
                self._link.answered(Restarting(question=number, engine=name, error=error))
            case ChangeEngines():
                error = (
                    "these engines run already: whoever started them starts and stops them; POST "
                    "and DELETE /pdlaunch/engines tell this router of it"
                )
                self._link.answered(Answered(question=number, error=error))
            case SetDrained(name=name, is_drained=is_drained):
                error = self._membership.set_drained(name, is_drained=is_drained)
                is_known = self._membership.member(name) is not None
                self._link.answered(
                    Answered(
                        question=number,
                        engine=name,
                        error=error,
                        code="refused" if is_known else "engine_not_found",
                    )
                )


async def _tell_left(admission: Admission, timeout_s: float) -> None:
    """Log how many requests a drain waits for, when it begins and whenever fewer are left."""
    _logger.info("draining for %g s at most: %d requests left", timeout_s, admission.in_flight)
    told = admission.in_flight
    while admission.in_flight:
        await asyncio.sleep(TELL_LEFT_EVERY_S)
        if admission.in_flight != told:
            told = admission.in_flight
            _logger.info("draining: %d requests left", told)
