"""Runs a router: under the supervisor of a launch, or alone in front of running engines.

::

    listen at the admin socket and for clients ── follow the membership ── drain ── close

A supervisor sends registries, Drain and Stop. Alone, the router watches its engines itself, drains
at the first signal and stops at the second one.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
from aiohttp import web

from pdlaunch.config.http_names import local_url
from pdlaunch.config.shared_settings import AutopilotMode
from pdlaunch.errors import ConfigError, OverloadedError, PdlaunchError
from pdlaunch.http.connections import UPSTREAM_CONNECTIONS, HttpRunner, fit
from pdlaunch.http.lifecycle import Supervised
from pdlaunch.machine.network import LISTEN_BACKLOG
from pdlaunch.protocol import control
from pdlaunch.protocol.bottleneck import HOLD_S, Look, decide
from pdlaunch.protocol.certificates import CertificateFiles, client_context
from pdlaunch.protocol.process.bootstrap import RouterSpec
from pdlaunch.protocol.process.run_dirs import ADMIN_SOCKET, LaunchCard, new_launch_id
from pdlaunch.protocol.status import DeploymentStatus
from pdlaunch.router.admin import SupervisorLink, listen_at_admin_socket
from pdlaunch.router.app import RouterApp
from pdlaunch.router.engine import Engine
from pdlaunch.router.engine_client import EngineClient
from pdlaunch.router.membership import Member, WatchedMembership, WatchSettings
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.state import RouterState

_logger = logging.getLogger(__name__)

CERTIFICATE_POLL_S = 2.0
# The autopilot: seconds between two checks, the pause after a change as a multiple of the time that
# the change took, and the pause after a refusal.
LOOK_EVERY_S = 2.0
PAUSE_FACTOR = 5.0
REFUSED_S = 600.0
CLIENT_READ_TIMEOUT_S = 20.0  # close connections of clients that read nothing for this long
_NOT_OURS = (
    "this router did not start its engines: start, stop and restart them where they run; it drains "
    "those that leave engines_file"
)
# The garbage collector runs after this many new objects (allocations minus deallocations).
_NEW_OBJECTS = 10_000


@contextlib.asynccontextmanager
async def serving(
    router: RouterApp, spec: RouterSpec, run_dir: Path, launch_id: str
) -> AsyncIterator[str]:
    """Serve clients, and commands at ``run_dir``, while the block runs; yield the clients' URL."""
    url = _url_of(spec)
    runners: list[web.AppRunner] = []
    tls = None if spec.certificate is None else spec.certificate.context()
    following = asyncio.ensure_future(follow_certificate(spec.certificate, tls))
    try:
        runner = HttpRunner(router.app, max_connections=spec.max_connections, tls=tls)
        runners.append(runner)
        await runner.setup()
        runners.append(await listen_at_admin_socket(router.app, run_dir / ADMIN_SOCKET))
        LaunchCard(launch_id=launch_id, url=url).write(run_dir)
        await listen(runner, spec.listeners)
        runner.drop_stalled_readers(CLIENT_READ_TIMEOUT_S)
        # The objects that exist when the router is ready stay for its lifetime, and requests make
        # hardly any garbage cycles. A full collection would hold up all streams.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_NEW_OBJECTS)
        yield url
    finally:
        following.cancel()
        await asyncio.gather(*(each.cleanup() for each in runners))


async def run_in_launch(supervised: Supervised) -> None:
    """Serve under a supervisor until Stop or a signal."""
    bootstrap = supervised.bootstrap
    assert bootstrap.router is not None
    spec, certificate = limited(bootstrap.router), bootstrap.keys.certificate
    link = SupervisorLink(supervised.send)

    def key_of(engine: Engine) -> str | None:
        is_ours = engine.capabilities.takes_launch_token
        return bootstrap.keys.http_token if is_ours else bootstrap.engine_api_key

    tls = None if certificate is None else client_context(certificate)
    state = RouterState(
        EnginePool(time.monotonic, spec.routing),
        EngineClient(key_of, tls),
        RouterMetrics(spec.served_model_name),
        prove_again=supervised.send,
        model_dir=spec.model_dir,
        keys=spec.keys,
    )
    router = RouterApp(spec, state, link)
    supervised.register(control.Address(http=_url_of(spec)))
    supervised.spawn(router.view.run())
    note = partial(state.events.add, "launch", "", is_bad=False)
    look = router.view.status
    supervised.spawn(run_autopilot(spec.autopilot, look, link.ask, note, clock=time.monotonic))
    # Begin to wait for the first registry before ``_obey`` can apply it.
    knowing = asyncio.ensure_future(state.registry_change())
    obeying = asyncio.ensure_future(_obey(supervised, router, state, link))
    try:
        # Listen only when the registry is known: waiting clients would get "starting" errors.
        await asyncio.wait([obeying, knowing], return_when=asyncio.FIRST_COMPLETED)
        if obeying.done():
            await obeying
            return
        run_dir = Path(bootstrap.run_dir)
        async with serving(router, spec, run_dir, bootstrap.launch_id):
            supervised.send(control.Ready())
            await obeying
    finally:
        obeying.cancel()
        knowing.cancel()
        await state.close()


async def run_autopilot(
    mode: AutopilotMode,
    look: Callable[[], Awaitable[DeploymentStatus]],
    ask: Callable[[control.ChangeEngines], Awaitable[control.Answered]],
    note: Callable[[str], None],
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Change the roles of engines when the load changes, until cancelled. ``note`` shows events.

    ::

        every 2 s: what limits? ── the same for 30 s ──▶ pdlaunch role ──▶ pause ── watch again

    An engine serves nothing while it drains and starts. The pause is at least five times as long,
    so changes take at most a sixth of the time.
    """

    def say(text: str) -> None:
        _logger.info("%s", text)
        note(text)

    looks: list[Look] = []
    quiet_until_at = 0.0
    while mode != "off":
        await sleep(LOOK_EVERY_S)
        status = await look()
        engines = [(each.name, each.shown_state) for each in status.engines]
        looks = [*looks[-int(HOLD_S / LOOK_EVERY_S) :], Look(clock(), status.bottleneck, engines)]
        found = decide(looks, clock()) if clock() >= quiet_until_at else None
        if found is None:
            continue
        say(f"autopilot{': would act' if mode == 'dry-run' else ''}: {found.why}; {found.advice}")
        begun_at, error = clock(), ""
        if mode == "on":
            command = control.ChangeEngines(question=0, engine=found.engine, role=found.role)
            try:
                error = (await ask(command)).error
            except OverloadedError as failure:
                error = str(failure)
            if error:
                say(f"autopilot: {found.engine}: {error}")
        looks.clear()
        pause_s = REFUSED_S if error else max(HOLD_S, PAUSE_FACTOR * (clock() - begun_at))
        quiet_until_at = clock() + pause_s


async def _obey(
    supervised: Supervised, router: RouterApp, state: RouterState, link: SupervisorLink
) -> None:
    """Handle messages from the supervisor until Stop, also while a drain is running."""
    draining: asyncio.Task[None] | None = None

    async def drain(timeout_s: float) -> None:
        if not await router.admission.drain(timeout_s):
            num_left = router.admission.in_flight
            _logger.warning("%d requests still run after %g s of draining", num_left, timeout_s)
            await router.close()
        supervised.send(control.Drained())

    while True:
        match await supervised.inbox.get():
            case control.Registry() as registry:
                state.update(registry)
            case control.Happened() as told if told.prefill:
                state.pair_failed(told.prefill, told.decode, told.text)
            case control.Happened(text=text):
                state.events.add("launch", "", text, is_bad=False)
            case control.Answered() as answer:
                link.answered(answer)
            case control.Suspects() as suspects:
                state.suspects.take(suspects)
            case control.Drain(timeout_s=timeout_s):
                draining = supervised.spawn(drain(timeout_s))
            case control.Stop():
                if draining is not None:
                    draining.cancel()
                await router.close()
                return
            case PdlaunchError() as error:
                raise error


async def run_alone(
    spec: RouterSpec,
    watch: WatchSettings,
    engines: Sequence[Member],
    engines_file: Path | None,
    run_dir: Path,
    signals: asyncio.Queue[None],
) -> None:
    """Serve until the first of ``signals``, then drain until a time-out or the next signal."""
    spec = limited(spec)
    pool, metrics = EnginePool(time.monotonic, spec.routing), RouterMetrics(spec.served_model_name)
    membership = WatchedMembership(watch, pool, metrics)
    client, prove_again = EngineClient(membership.key_of), membership.prove_again
    state = RouterState(pool, client, metrics, prove_again=prove_again, keys=spec.keys)
    link = SupervisorLink(
        lambda asked: link.answered(control.Answered(question=asked.question, error=_NOT_OURS))
    )
    router = RouterApp(spec, state, link)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, signals.put_nowait, None)
    for member in engines:
        membership.add(member, "config")
    tasks = [asyncio.ensure_future(router.view.run())]
    if engines_file is not None:
        following = membership.follow(engines_file, spec.drain_timeout_s)
        tasks.append(asyncio.ensure_future(following))
    membership.announce = state.update
    membership.publish()
    try:
        async with serving(router, spec, run_dir, new_launch_id()) as url:
            _logger.info("listening at %s, for commands at %s", url, run_dir / ADMIN_SOCKET)
            await signals.get()
            timeout_s, num_left = spec.drain_timeout_s, router.admission.in_flight
            _logger.info("draining for %g s at most: %d requests left", timeout_s, num_left)
            draining = asyncio.ensure_future(router.admission.drain(timeout_s))
            impatient = asyncio.ensure_future(signals.get())
            await asyncio.wait([draining, impatient], return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
            impatient.cancel()
            await router.close()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await membership.close()
        await state.close()


async def listen(runner: web.AppRunner, listeners: Sequence[int]) -> None:
    """Accept connections, also those made earlier, at the supervisor's sockets."""
    for descriptor in listeners:
        listener = socket.socket(fileno=descriptor)
        listener.set_inheritable(False)
        await web.SockSite(runner, listener, backlog=LISTEN_BACKLOG).start()


def _url_of(spec: RouterSpec) -> str:
    return local_url(spec.host, spec.port, is_tls=spec.certificate is not None)


async def follow_certificate(
    files: CertificateFiles | None, tls: ssl.SSLContext | None, poll_s: float = CERTIFICATE_POLL_S
) -> None:
    """Poll the certificate files; use changed ones for new connections unless they are invalid."""
    latest: list[bytes] | None = None
    while files is not None and tls is not None:
        before, latest = latest, files.contents()
        if before == latest:
            await asyncio.sleep(poll_s)
            continue
        try:
            # Load them into another context first: a half-written file would break the one in use.
            files.context()
            files.load(tls)
            _logger.info("new connections use the certificate %s", files.certfile)
        except ConfigError as error:
            _logger.error("%s; the earlier certificate stays in use", error)


def limited(spec: RouterSpec) -> RouterSpec:
    """Return ``spec`` with limits on requests and connections that the descriptors allow."""
    # Allow as many idle clients as requests. Each request also has its client's connection.
    requests = fit(spec.max_queued_requests, num_each=2 + UPSTREAM_CONNECTIONS)
    connections = fit(spec.max_connections, num_others=UPSTREAM_CONNECTIONS * requests)
    if (requests, connections) != (spec.max_queued_requests, spec.max_connections):
        text = "few descriptors (ulimit -n): at most %d requests and %d connections at a time"
        _logger.warning(text, requests, connections)
    return msgspec.structs.replace(spec, max_queued_requests=requests, max_connections=connections)
