"""Runs one engine of vLLM: ``python -m pdlaunch.launch.sidecar --name NAME [OPTIONS] -- COMMAND``.

``COMMAND`` starts the engine. The supervisor starts and controls the sidecar.

::

    start the engine -> Register -> healthy, ranks up? ──> Ready -> watch ──> Drain -> Stop
         Registry ──> pairs.py: handshakes, canaries ──> PairReady    (decode engines)
    the engine ends, or hangs ──> Failed: the supervisor restarts both
"""

import argparse
import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from pdlaunch.config.engine_spec import ENGINE_HOST
from pdlaunch.config.external import UNIX
from pdlaunch.config.model_files.weights import changes, model_digest
from pdlaunch.errors import ProtocolError, StartupError
from pdlaunch.http import engine_calls
from pdlaunch.http.canary import FIRST_TOKEN_ID
from pdlaunch.http.kv_feed import KVFeed
from pdlaunch.http.lifecycle import Supervised, run_supervised
from pdlaunch.launch.sidecar import engine
from pdlaunch.launch.sidecar.door import Door
from pdlaunch.launch.sidecar.kv_events import VllmKVEvents, listen_for_routers
from pdlaunch.launch.sidecar.pairs import EngineLink, EnginePairs
from pdlaunch.machine.network import foreign_listener
from pdlaunch.protocol.control import Address, Drained, Progress, Ready, Registry, SleepState
from pdlaunch.protocol.engine_link import RankUp, rank_entries
from pdlaunch.protocol.ids import EngineId

_logger = logging.getLogger("pdlaunch.launch.sidecar")  # __main__ would log only warnings

START_POLL_S = 0.5
WATCH_POLL_S = 2.0
DRAIN_POLL_S = 0.5
HEALTH_TIMEOUT_S = 30.0
END_TIMEOUT_S = 2.0  # how long an unhealthy engine may take to exit by itself
SLEEP_FLAG = "--enable-sleep-mode"
_PROGRESS = ("vllm:generation_tokens_total", "vllm:iteration_tokens_total_sum")
Found = Literal["works", "idle", "hangs"]


class SidecarProcess:
    """Runs one vLLM engine. Create it inside a running event loop, and call ``run`` once."""

    def __init__(self, supervised: Supervised, options: engine.SidecarOptions) -> None:
        self._supervised = supervised
        self._options = options
        bootstrap = supervised.bootstrap
        spec, self._key = bootstrap.door, bootstrap.engine_api_key
        self._name, self._run_dir = bootstrap.name, Path(bootstrap.run_dir)
        self._socket_path = self._run_dir / f"{self._name}.sock"
        self._port = options.value("--port")  # empty: the engine listens at the Unix socket
        at_port = f"http://{options.value('--host')}:{self._port}"
        self._url = at_port if self._port else f"{UNIX}{self._socket_path}"
        self._api = engine_calls.EngineApi(self._url, self._key)
        self._kv_feed = KVFeed(options.dp_size)
        self._kv_socket_path = self._run_dir / f"{self._name}.kv.sock"
        self._door: Door | None = None
        if spec is not None:
            self._door = Door(self._name, spec, bootstrap.keys, self._url, self._key, self._kv_feed)
        # None if the engine has vLLM's own connector or no connector.
        self._link: EngineLink | None = None
        if (connector := bootstrap.connector) is not None:
            self._link = EngineLink(
                supervised.context, bootstrap, connector, over_hosts=options.spans_hosts
            )
        self._output = engine.EngineOutput()
        self._model_files: dict[str, str] = {}  # name -> digest, before the start of vLLM
        self._registered_url = self._url  # the URL of the door, once it is open
        self._capabilities = msgspec.structs.replace(
            bootstrap.capabilities, takes_launch_token=self._door is not None
        )
        ports = "" if spec is None else spec.data_ports
        host = os.environ.get(engine.SIDE_CHANNEL_HOST, ENGINE_HOST)
        self._side_channel = None if self._link else engine.hold_side_channel(host, ports)
        # Holds the master port, at which vLLM's ranks on all hosts of the engine meet.
        address = options.value("--master-addr")
        self._meeting = engine.hold_side_channel(address, ports) if options.spans_hosts else None
        self._master_port = 0 if self._meeting is None else self._meeting.getsockname()[1]
        self._is_ready = False
        self._probe: asyncio.Task[None] | None = None  # requests one token of an idle engine
        self._registry: Registry | None = None
        self._pairs = EnginePairs(supervised, options, self._api, self._link)

    async def run(self) -> None:
        """Run until Stop or a signal. Raises StartupError if the engine ends by itself."""
        try:
            await self._run()
        finally:
            for opened in (self._link, self._side_channel, self._meeting):
                if opened is not None:
                    opened.close()

    async def _run(self) -> None:
        if not self._port:
            self._socket_path.unlink(missing_ok=True)
        if self._options.unverified:
            reason = self._options.unverified
            _logger.warning("pulled KV blocks are used without proof: %s", reason)
        # Compute digests before vLLM reads the files; ``_become_ready`` compares them.
        self._model_files = await engine.read_pinned(self._options, self._supervised.bootstrap)
        if not model_digest(self._model_files):
            _logger.warning("vLLM downloads the model itself: changes of its files are not noticed")
        command = self._command()
        child = await engine.start_engine(command, self._environment())
        _logger.info("started %s as process %d", self._options.command[0], child.pid)
        watches: list[asyncio.Task[None]] = []
        kv_events = [
            VllmKVEvents(command, self._kv_feed, rank) for rank in range(self._options.dp_size)
        ]
        kv_runner = await listen_for_routers(self._kv_socket_path, self._kv_feed)
        try:
            if self._door is not None:
                self._registered_url = await self._door.open()
            self._register(listens=self._door is not None)
            watches = [
                self._supervised.spawn(self._fail_with(child)),
                self._supervised.spawn(self._watch(child)),
                *(self._supervised.spawn(each.run()) for each in kv_events),
            ]
            if self._link is not None:
                watches.append(self._supervised.spawn(self._handle_workers(self._link)))
            await self._supervised.obey(self._learn, self._drain)
        finally:
            for task in watches:
                task.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            await self._pairs.canaries.close()
            for each in kv_events:
                each.close()
            self._kv_feed.close()
            await kv_runner.cleanup()
            if self._door is not None:
                await self._door.close()
            await self._api.close()
            await engine.stop_engine(child)

    def _command(self) -> tuple[str, ...]:
        where = () if self._port else ("--uds", str(self._socket_path))
        events = f"ipc://{self._run_dir / self._name}.inproc"
        port = ("--master-port", str(self._master_port)) if self._master_port else ()
        return (*engine.with_events_at(self._options.command, events), *where, *port)

    def _environment(self) -> dict[str, str]:
        own = engine.engine_environment(self._run_dir, self._key, self._side_channel)
        if self._link is None:
            return own
        bootstrap, link = self._supervised.bootstrap, self._link.endpoint
        return own | engine.connector_environment(bootstrap, link, self._model_files)

    def _register(self, *, listens: bool = True) -> None:
        link, engine_id = self._link, EngineId("")
        url = self._registered_url
        kv_events = url if self._door else f"{UNIX}{self._kv_socket_path}"
        address = Address(http=url, kv_events=kv_events, master_port=self._master_port)
        if link is not None:
            engine_id = link.engine_id
            address.side_channels, address.link = link.side_channels, link.endpoint
        self._supervised.register(address, self._capabilities, engine_id=engine_id, listens=listens)

    def _fail(self, reason: str) -> None:
        self._supervised.inbox.put_nowait(StartupError(reason))

    async def _fail_with(self, child: asyncio.subprocess.Process) -> None:
        self._fail(engine.end_of(self._options, await child.wait(), self._output))

    async def _drain(self, timeout_s: float) -> None:
        with contextlib.suppress(ProtocolError, TimeoutError):
            async with asyncio.timeout(timeout_s):
                while engine_calls.is_vllm_busy(await self._api.counts(HEALTH_TIMEOUT_S)):  # noqa: ASYNC110
                    await asyncio.sleep(DRAIN_POLL_S)
        self._supervised.send(Drained())

    # Watching the engine

    async def _watch(self, child: asyncio.subprocess.Process) -> None:
        """Send Ready once the engine is healthy; fail if it becomes unhealthy or hangs."""
        if not await self._become_ready():
            return
        hangs = EngineHangWatch(self._options.hang_timeout_s)
        can_sleep, is_asleep = SLEEP_FLAG in self._options.command, False
        while True:
            await asyncio.sleep(WATCH_POLL_S)
            sleeps = await self._api.is_sleeping(HEALTH_TIMEOUT_S) if can_sleep else None
            if sleeps is not None and sleeps != is_asleep:
                is_asleep = sleeps
                self._supervised.send(SleepState(state="sleeping" if is_asleep else "awake"))
            if (healthy := await self._api.is_healthy(HEALTH_TIMEOUT_S)) is not True:
                with contextlib.suppress(TimeoutError):
                    # If it exits, ``_fail_with`` reports the reason.
                    await asyncio.wait_for(child.wait(), END_TIMEOUT_S)
                    return
                # If the core has ended, /health fails before the server exits, if it exits at all.
                cause = self._output.cause()
                dead = f"its engine core is dead: {cause.error if cause else '/health is not 200'}"
                late = f"/health did not answer within {HEALTH_TIMEOUT_S:g} s"
                self._fail(late if healthy is None else dead)
                return
            try:
                counts = await self._api.counts(HEALTH_TIMEOUT_S)
            except ProtocolError as error:
                _logger.warning("%s", error)
                continue
            self._pairs.look(counts)
            if is_asleep:
                if self._probe is not None:
                    self._probe.cancel()  # a sleeping engine would hold the request
                continue
            is_probed = self._probe is not None and not self._probe.done()
            match hangs.look(counts, is_probed=is_probed):
                case "idle":
                    self._probe = self._supervised.spawn(self._send_probe())
                case "hangs":
                    hang_s = self._options.hang_timeout_s
                    self._fail(f"it has requests, but has computed nothing for {hang_s:g} s")
                    return
                case "works":
                    pass

    async def _become_ready(self) -> bool:
        """Wait until the engine is healthy, and send Ready; return False if the model changed."""
        self._supervised.send(Progress(text="vLLM is starting"))
        while not await self._is_there():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(START_POLL_S)
        if self._link is not None and not self._link.all_up.is_set():
            self._supervised.send(Progress(text=self._link.progress))
            await self._link.all_up.wait()
        # Before Ready: routers use the engine's capabilities, which depend on its version.
        try:
            version = await self._api.version(HEALTH_TIMEOUT_S)
            self._capabilities = engine_calls.with_version(self._capabilities, version)
            counts = await self._api.counts(HEALTH_TIMEOUT_S)
            self._kv_feed.num_tokens = counts.kv_cache_tokens // self._options.dp_size
        except ProtocolError as error:
            _logger.warning("%s", error)
        self._register()
        if changed := changes(
            self._model_files, await asyncio.to_thread(self._options.model_files)
        ):
            self._fail(f"the model has changed while vLLM was starting: {changed}")
            return False
        self._supervised.send(Ready(model=self._model_files))
        self._is_ready = True
        await self._learn(self._registry)
        return True

    async def _is_there(self) -> bool:
        """Return True if the engine is healthy; fail if another user's process has its port."""
        if self._port and (uid := foreign_listener(int(self._port))) is not None:
            self._fail(
                f"a process of another user (id {uid}) listens at port {self._port}, which the "
                "engine needs; free it, or choose another port"
            )
            return False
        return bool(await self._api.is_healthy(HEALTH_TIMEOUT_S))

    async def _send_probe(self) -> None:
        """Request one token, so that the hang watch can see progress of an idle engine."""
        body = {"prompt": [FIRST_TOKEN_ID], "max_tokens": 1, "temperature": 0}
        try:
            # Longer than the hang watch takes to find that the probe makes no progress.
            timeout_s = self._options.hang_timeout_s + 2 * HEALTH_TIMEOUT_S
            await self._api.complete({"model": self._options.model, **body}, timeout_s)
        except ProtocolError as error:
            _logger.warning("a probe of one token failed: %s", error)

    # Workers and the registry

    async def _handle_workers(self, link: EngineLink) -> None:
        """Handle the messages of workers. Returns if an error must end the engine."""
        while True:
            try:
                message = await link.receive()
            except ProtocolError as error:
                self._fail(f"{self._name} cannot exchange KV blocks: {error}")
                return
            match message:
                case RankUp():
                    if self._is_ready:
                        self._register()
                    else:
                        self._supervised.send(Progress(text=link.progress))
                case SleepState():
                    self._supervised.send(message)
                case _:
                    self._pairs.take(message)

    async def _learn(self, registry: Registry | None) -> None:
        """Keep the newest registry; use it once vLLM has started."""
        self._registry = registry
        if registry is None or not self._is_ready:
            return
        self._pairs.learn(registry)
        if self._link is not None:
            others = (entry for entry in registry.entries if entry.name != self._name)
            await self._link.send_peers(rank_entries(others))


@dataclass(eq=False)
class EngineHangWatch:
    """Detects from an engine's metrics, call by call, that it hangs.

    ::

        has work, counts progress ──> works      has work, no progress for timeout_s ──> hangs
        has no work for timeout_s ──> idle: the caller sends a probe, and the next calls judge it

    The probe is needed because an engine whose core has stopped reports that it is healthy and has
    no work. ``timeout_s``: 0 turns this off: the result is always ``works``.
    """

    timeout_s: float
    clock: Callable[[], float] = time.monotonic
    _seen: tuple[float, bool] | None = None  # progress, and whether it has work
    _since_at: float = 0.0  # when ``_seen`` last changed

    def look(self, counts: engine_calls.Counts, *, is_probed: bool) -> Found:
        """Judge the engine. ``is_probed``: it has work, even if its metrics show none."""
        now_at = self.clock()
        has_work = is_probed or any(counts.total(name) for name in engine_calls.VLLM_RUNNING)
        seen = (sum(counts.total(name) for name in _PROGRESS), has_work)
        if seen != self._seen:
            self._seen, self._since_at = seen, now_at
        if not 0 < self.timeout_s < now_at - self._since_at:
            return "works"
        self._since_at = now_at
        return "hangs" if has_work else "idle"


async def _serve(supervised: Supervised) -> None:
    own_end = sys.argv.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--name")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--unverified", default="")
    parser.add_argument("--hang-timeout", type=float, default=0.0)
    found = parser.parse_args(sys.argv[1:own_end])
    command = tuple(sys.argv[own_end + 1 :])
    options = engine.SidecarOptions(command, found.exact, found.hang_timeout, found.unverified)
    process = engine.HeadlessNode if "--headless" in options.command else SidecarProcess
    await process(supervised, options).run()


if __name__ == "__main__":
    guard = engine.guard_group()
    sys.exit(run_supervised(_serve))
