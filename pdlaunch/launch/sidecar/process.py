"""Runs the sidecar of one engine, as the supervisor steers it.

::

    start the engine -> Register -> healthy? ──> Ready -> watch ──────> Drain -> Stop
         Registry: a prefill engine is ready ──> canary through it ──> PairReady    (decode engines)
    the engine ends, or stands still ──> Failed: the supervisor starts both anew
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from pdlaunch.config.engine_spec import ENGINE_HOST
from pdlaunch.errors import PdlaunchError, ProtocolError, StartupError
from pdlaunch.http.engine_calls import UNIX
from pdlaunch.http.lifecycle import Supervised
from pdlaunch.http.watch.canary import FIRST_TOKEN_ID, Canaries, CanaryDied, Proof, send_canary
from pdlaunch.http.watch.engine_api import (
    Counts,
    EngineApi,
    FailedReads,
    is_vllm_busy,
    with_version,
)
from pdlaunch.launch.sidecar.child import EngineChild
from pdlaunch.launch.sidecar.connector import Failures, connector_environment
from pdlaunch.launch.sidecar.hangs import EngineHangWatch
from pdlaunch.launch.sidecar.network import (
    SIDE_CHANNEL_HOST,
    SIDE_CHANNEL_PORT,
    SideChannelPort,
    named_devices,
)
from pdlaunch.launch.sidecar.opening import Opening
from pdlaunch.machine.network import foreign_listener, tcp_endpoint
from pdlaunch.protocol.changes import Answered, AwaitIdle
from pdlaunch.protocol.control import (
    Drain,
    Drained,
    Entry,
    Happened,
    PairFailed,
    PairReady,
    PairSuspect,
    Progress,
    Ready,
    Registry,
    Restarting,
    SleepState,
    Stop,
    Suspects,
)

_logger = logging.getLogger(__name__)

START_POLL_S = 0.5
WATCH_POLL_S = 2.0
DRAIN_POLL_S = 0.5
HEALTH_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0
EVENTS_FLAG = "--kv-events-config"
SLEEP_FLAG = "--enable-sleep-mode"


_Peer = tuple[str, int]
"""Name and incarnation of a prefill engine."""


@dataclass(frozen=True, slots=True)
class SidecarOptions:
    """Says what a sidecar starts, and how it is judged."""

    command: tuple[str, ...]
    """Starts the engine; without where it listens when it has no fixed port."""
    is_exact: bool
    hang_timeout_s: float
    """An engine that has work and makes no progress for so long is killed; 0: never. One that has
    had no work for so long is given a prompt of one token."""
    unverified: str
    """The reason why pulled KV blocks are used unproven; empty: it has pdlaunch's connector."""


class SidecarProcess:
    """Speaks for one engine of vLLM; made inside a running event loop, ``run`` once."""

    def __init__(self, supervised: Supervised, options: SidecarOptions) -> None:
        self._supervised = supervised
        self._options = options
        self._name = supervised.bootstrap.name
        self._url = _fixed_url(options.command)
        socket_path = Path(supervised.bootstrap.run_dir) / f"{self._name}.sock"
        self._socket_path = None if self._url else socket_path
        self._url = self._url or f"{UNIX}{socket_path}"
        self._key = supervised.bootstrap.engine_api_key
        self._api = EngineApi(self._url, self._key)
        self._registered_url = self._url
        """Others are told this one: that of the door, where there is one."""
        spec, is_verified = supervised.bootstrap.door, not options.unverified
        self._opening = (
            None
            if spec is None
            else Opening(supervised.bootstrap, spec, self._url, is_verified=is_verified)
        )
        self._capabilities = msgspec.structs.replace(
            supervised.bootstrap.capabilities, takes_launch_token=self._opening is not None
        )
        self._side_channel = SideChannelPort(
            os.environ.get(SIDE_CHANNEL_HOST, ENGINE_HOST), "" if spec is None else spec.data_ports
        )
        self._is_ready = asyncio.Event()
        self._canaries = Canaries(self._send_canary, self._tell_proof)
        self._peers: dict[_Peer, Entry] = {}
        self._one_at_a_time = asyncio.Semaphore(1)
        self._failed_reads = FailedReads()
        self._probe: asyncio.Task[None] | None = None
        """Asks an engine that was idle for one token."""
        self._failures = Failures(Path(supervised.bootstrap.run_dir), self._name)
        self._proven: dict[str, _Peer] = {}
        """Prefill engines and their incarnations, by the id that vLLM has given them."""
        self._listed: set[_Peer] = set()
        """Those of them that the registry has shown as proven."""

    async def run(self) -> None:
        """Run until Stop or a signal. Raises StartupError when the engine ends by itself."""
        supervised = self._supervised
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)
        if self._options.unverified:
            _logger.warning(
                "pulled KV blocks are used unproven: %s (kv_transfer.verify)",
                self._options.unverified,
            )
        child = await EngineChild.start(self._command(), self._environment())
        _logger.info("started %s as process %d", self._options.command[0], child.pid)
        watches: list[asyncio.Task[None]] = []
        try:
            if self._opening is not None:
                self._registered_url = await self._opening.open()
            self._register(listens=self._opening is not None)
            watches = [
                supervised.spawn(self._fail_with(child)),
                supervised.spawn(self._watch()),
            ]
            await self._obey()
        finally:
            for task in watches:
                task.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            await self._canaries.close()
            if self._opening is not None:
                await self._opening.close()
            await self._api.close()
            await child.stop(STOP_TIMEOUT_S)
            self._side_channel.close()

    async def _is_there(self) -> bool:
        """Return whether the engine answers, and nobody else at its port, who would be given the
        key.
        """
        port = urlsplit(self._url).port if self._socket_path is None else None
        if port is not None and (uid := foreign_listener(port)) is not None:
            self._fail(
                f"a program of another user (id {uid}) listens at port {port}, which is to be the "
                "engine's; free it, or choose another port"
            )
            return False
        return bool(await self._api.is_healthy(HEALTH_TIMEOUT_S))

    def _register(self, *, listens: bool = True) -> None:
        """Tell where the engine is reached, and what it can do."""
        self._supervised.register(
            self._registered_url,
            self._capabilities,
            side_channel=tcp_endpoint(self._side_channel.host, self._side_channel.number),
            listens=listens,
        )

    def _command(self) -> tuple[str, ...]:
        where = () if self._socket_path is None else ("--uds", str(self._socket_path))
        events = Path(self._supervised.bootstrap.run_dir) / f"{self._name}.events"
        return (*with_events_at(self._options.command, f"ipc://{events}"), *where)

    def _environment(self) -> dict[str, str]:
        run_dir = self._supervised.bootstrap.run_dir
        # The sockets between the engine's own processes: anybody may open those in /tmp.
        own = {"VLLM_RPC_BASE_PATH": run_dir, SIDE_CHANNEL_PORT: str(self._side_channel.number)}
        own |= named_devices(os.environ)
        if not self._options.unverified:
            own |= connector_environment(
                Path(run_dir),
                self._name,
                os.environ.get("PYTHONPATH", ""),
                is_far=self._opening is not None,
            )
        # Empty without one: a key of the user's shell would keep the router out.
        return own | {"VLLM_API_KEY": self._key or ""}

    async def _fail_with(self, child: EngineChild) -> None:
        how = await child.ended()
        self._supervised.inbox.put_nowait(
            StartupError(f"{Path(self._options.command[0]).name} {how}")
        )

    async def _watch(self) -> None:
        """Say Ready once the engine is healthy; fail when it is not any more, or stands still."""
        self._supervised.send(Progress(text="vLLM is starting"))
        while not await self._is_there():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(START_POLL_S)
        # Before Ready: what routers may ask of the engine from then on follows from its version.
        await self._tell_version()
        self._supervised.send(Ready())
        self._is_ready.set()
        hangs = EngineHangWatch(self._options.hang_timeout_s)
        can_sleep, is_asleep = SLEEP_FLAG in self._options.command, False
        while True:
            await asyncio.sleep(WATCH_POLL_S)
            told = await self._api.is_sleeping(HEALTH_TIMEOUT_S) if can_sleep else None
            if told is not None and told != is_asleep:
                is_asleep = told
                self._supervised.send(SleepState(state="sleeping" if is_asleep else "awake"))
            if not await self._api.is_healthy(HEALTH_TIMEOUT_S):
                self._fail(f"/health did not say 200 within {HEALTH_TIMEOUT_S:g} s")
                return
            try:
                counts = await self._api.counts(HEALTH_TIMEOUT_S)
            except ProtocolError as error:
                _logger.warning("%s", error)
                continue
            self._doubt_pairs(counts)
            if is_asleep:
                if self._probe is not None:
                    self._probe.cancel()  # the engine would keep it until it is awake
                continue
            is_probed = self._probe is not None and not self._probe.done()
            match hangs.look(counts, is_probed=is_probed):
                case "idle":
                    self._probe = self._supervised.spawn(self._send_probe())
                case "hangs":
                    hang_s = self._options.hang_timeout_s
                    self._fail(f"it has requests and has computed nothing for {hang_s:g} s")
                    return
                case "works":
                    pass

    async def _send_probe(self) -> None:
        """Have the engine compute one token, so that it can be seen whether it still does."""
        body = {"prompt": [FIRST_TOKEN_ID], "max_tokens": 1, "temperature": 0}
        model = {"model": _served_model_name(self._options.command)}
        try:
            # Longer than a look takes to find that nothing comes of it.
            timeout_s = self._options.hang_timeout_s + 2 * HEALTH_TIMEOUT_S
            await self._api.complete(model | body, timeout_s)
        except ProtocolError as error:
            _logger.warning("a probe of one token: %s", error)

    def _doubt_pairs(self, counts: Counts) -> None:
        """Have pairs proven anew from which READs have failed since the last look.

        pdlaunch's connector tells which these are; vLLM's does not, so that all are in doubt when
        no READ has come through: prompts that were handed over are computed here.
        """
        none_comes = self._failed_reads.look(counts)
        told = Counter(self._failures.latest())
        for engine_id, count in told.items():
            if engine_id in self._proven:
                self._doubt(
                    *self._proven[engine_id], f"READs of its KV blocks fail, {count} just now"
                )
        if none_comes and not told:
            for peer, incarnation in self._listed:
                self._doubt(peer, incarnation, "READs of KV blocks fail, and none comes through")

    def _doubt(self, peer: str, incarnation: int, error: str) -> None:
        _logger.warning("%s -> %s: %s", peer, self._name, error)
        self._supervised.send(
            PairSuspect(local=self._name, peer=peer, peer_incarnation=incarnation, error=error)
        )

    async def _tell_version(self) -> None:
        """Register again, with what this version of the engine can do."""
        try:
            version = await self._api.version(HEALTH_TIMEOUT_S)
        except ProtocolError as error:
            _logger.warning("%s", error)
            return
        self._capabilities = with_version(self._capabilities, version)
        self._register()

    def _fail(self, reason: str) -> None:
        self._supervised.inbox.put_nowait(StartupError(reason))

    async def _obey(self) -> None:
        """Do what the supervisor says until Stop. Raises the error of the engine."""
        while True:
            match await self._supervised.inbox.get():
                case Registry() as registry:
                    if self._opening is not None:
                        self._opening.learn(registry)
                    self._prove_pairs(registry)
                case Drain(timeout_s=timeout_s):
                    self._supervised.spawn(self._drain(timeout_s))
                case Stop():
                    return
                case PdlaunchError() as error:
                    raise error
                case Suspects() | Restarting() | Answered() | AwaitIdle() | Happened():
                    pass  # said to routers alone

    def _prove_pairs(self, registry: Registry) -> None:
        """Send a canary through each prefill engine that has none yet or whose proof was dropped;
        forget those that left.
        """
        own = next((entry for entry in registry.entries if entry.name == self._name), None)
        if own is None or own.role != "decode":
            return
        peers = {
            (entry.name, entry.incarnation): entry
            for entry in registry.entries
            if entry.kind == "server" and entry.role == "prefill" and entry.state == "ready"
        }
        listed = {
            (pair.peer, pair.peer_incarnation)
            for pair in registry.pairs
            if pair.local == self._name
        }
        # What was listed and is no more is in doubt, and has to be proven anew.
        self._canaries.forget(self._canaries.pairs() - peers.keys() | self._listed - listed)
        self._listed, self._peers = listed, peers
        for entry in registry.entries:
            if entry.state == "sleeping" and (entry.name, entry.incarnation) in listed:
                self._doubt(entry.name, entry.incarnation, "it sleeps")
        self._canaries.prove(peers)

    async def _send_canary(self, peer: _Peer) -> Proof:
        await self._is_ready.wait()
        url = self._peers[peer].address.http
        # All engines of a launch have doors, or none has.
        api = EngineApi(url, self._key) if self._opening is None else self._opening.api_of(url)
        try:
            async with self._one_at_a_time:
                model = _served_model_name(self._options.command)
                return await send_canary(api, self._api, model, is_exact=self._options.is_exact)
        finally:
            await api.close()

    def _tell_proof(self, peer: _Peer, result: Proof | CanaryDied) -> None:
        name, incarnation = peer
        if isinstance(result, CanaryDied):
            self._supervised.send(
                PairFailed(local=self._name, peer=name, error=str(result), fatal=result.fatal)
            )
            return
        self._proven[str(result.params.get("remote_engine_id"))] = peer
        self._supervised.send(
            PairReady(
                local=self._name,
                peer=name,
                peer_incarnation=incarnation,
                seconds=result.seconds,
                path="nixl/vLLM",
                gigabytes_per_s=result.gigabytes_per_s,
            )
        )

    async def _drain(self, timeout_s: float) -> None:
        """Wait until the engine has nothing to do and lends nothing, at most ``timeout_s``."""
        ends_at = time.monotonic() + timeout_s
        while time.monotonic() < ends_at:
            try:
                counts = await self._api.counts(HEALTH_TIMEOUT_S)
            except ProtocolError:
                break
            if not is_vllm_busy(counts):
                break
            await asyncio.sleep(DRAIN_POLL_S)
        self._supervised.send(Drained())


def with_events_at(command: tuple[str, ...], endpoint: str) -> tuple[str, ...]:
    """Return the command with KV events published at ``endpoint``, where it asks for events.

    vLLM's own default is a TCP port on every address. A command that names an endpoint keeps it.
    """
    if EVENTS_FLAG not in command:
        return command
    at = command.index(EVENTS_FLAG) + 1
    config = {"endpoint": endpoint, **json.loads(command[at])}
    return (*command[:at], json.dumps(config), *command[at + 1 :])


def _fixed_url(command: tuple[str, ...]) -> str:
    """Return the URL of an engine whose command gives it a port, empty without one."""
    if "--port" not in command:
        return ""
    host, port = (command[command.index(flag) + 1] for flag in ("--host", "--port"))
    return f"http://{host}:{port}"


def _served_model_name(command: tuple[str, ...]) -> str:
    return command[command.index("--served-model-name") + 1]
