"""Runs the sidecar of one engine, as the supervisor steers it.

::

    start the engine -> Register -> healthy? ──> Ready -> watch ──────> Drain -> Stop
         Registry: a prefill engine is ready ──> canary through it ──> PairReady    (decode engines)
    the engine ends, or stands still ──> Failed: the supervisor starts both anew
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from pdlaunch.config.model_files.identity import changes, text_digests, weight_digests
from pdlaunch.errors import ConfigError, PdlaunchError, ProtocolError, StartupError
from pdlaunch.http.engine_calls import UNIX
from pdlaunch.http.lifecycle import Supervised
from pdlaunch.http.watch.canary import FIRST_TOKEN_ID, Canaries, CanaryDied, Proof, send_canary
from pdlaunch.http.watch.engine_api import (
    VLLM_RUNNING,
    Counts,
    EngineApi,
    FailedReads,
    is_vllm_busy,
    with_version,
)
from pdlaunch.launch.sidecar.door import Door, StatementDesk, statement_route
from pdlaunch.launch.sidecar.engine import (
    Failures,
    connector_environment,
    engine_environment,
    hold_side_channel,
    side_channel_host,
    start_engine,
    statements_folder,
    statements_socket,
    stop_engine,
    with_events_at,
)
from pdlaunch.machine.network import foreign_listener, tcp_endpoint
from pdlaunch.protocol.certificates import client_context
from pdlaunch.protocol.control import (
    Answered,
    Drain,
    Drained,
    EngineIdle,
    Entry,
    Happened,
    PairFailed,
    PairReady,
    PairSuspect,
    Progress,
    Ready,
    Registry,
    SleepState,
    Stop,
    Suspects,
)

_logger = logging.getLogger(__name__)

START_POLL_S = 0.5
WATCH_POLL_S = 2.0
DRAIN_POLL_S = 0.5
HEALTH_TIMEOUT_S = 30.0
SLEEP_FLAG = "--enable-sleep-mode"
_PROGRESS = ("vllm:generation_tokens_total", "vllm:iteration_tokens_total_sum")
Found = Literal["works", "idle", "hangs"]
Peer = tuple[str, int]  # name and incarnation of a prefill engine


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

    @property
    def model(self) -> str:
        return self.value("--served-model-name")

    def model_files(self) -> dict[str, str]:
        """Return digests of the model's files, by name; of a model of a hub, none."""
        folder = Path(self.command[2])  # vllm serve MODEL
        if not folder.is_dir():
            return {}
        try:
            weights = weight_digests(folder, dummy=self.value("--load-format") == "dummy")
        except (ConfigError, OSError, ValueError):
            weights = {}  # vLLM takes formats that cannot be sampled
        return weights | text_digests(folder)

    def value(self, flag: str) -> str:
        """Return what the command has behind a flag; empty: the flag is not there."""
        if flag not in self.command:
            return ""
        return self.command[self.command.index(flag) + 1]


class SidecarProcess:
    """Speaks for one engine of vLLM; made inside a running event loop, ``run`` once."""

    def __init__(self, supervised: Supervised, options: SidecarOptions) -> None:
        self._supervised = supervised
        self._options = options
        bootstrap = supervised.bootstrap
        self._name, self._run_dir = bootstrap.name, Path(bootstrap.run_dir)
        self._key, spec = bootstrap.engine_api_key, bootstrap.door
        self._socket_path = self._run_dir / f"{self._name}.sock"
        port = options.value("--port")
        self._is_at_port = bool(port)
        self._url = (
            f"http://{options.value('--host')}:{port}" if port else f"{UNIX}{self._socket_path}"
        )
        self._api = EngineApi(self._url, self._key)
        self._door: Door | None = None
        self._desk: StatementDesk | None = None
        if spec is not None:
            further = []
            if not options.unverified:
                further = [statement_route(statements_folder(self._run_dir))]
                asks = statements_socket(self._run_dir, self._name)
                self._desk = StatementDesk(asks, bootstrap.keys)
            keys = bootstrap.keys
            self._door = Door(self._name, spec, keys, self._url, self._key, further)
        self._registered_url = self._url
        """The URL that others are told: that of the door, where there is one."""
        self._capabilities = msgspec.structs.replace(
            bootstrap.capabilities, takes_launch_token=self._door is not None
        )
        self._side_channel = hold_side_channel(
            side_channel_host(), "" if spec is None else spec.data_ports
        )
        self._is_ready = asyncio.Event()
        self._canaries = Canaries(self._send_canary, self._tell_proof)
        self._peers: dict[Peer, Entry] = {}
        self._one_at_a_time = asyncio.Semaphore(1)
        self._probe: asyncio.Task[None] | None = None
        """Asks an engine that was idle for one token."""
        self._failed_reads = FailedReads()
        self._failures = Failures(self._run_dir, self._name)
        self._proven: dict[str, Peer] = {}
        """Prefill engines and their incarnations, by the id that vLLM has given them."""
        self._listed: set[Peer] = set()
        """The prefill engines that the registry lists as proven."""

    async def run(self) -> None:
        """Run until Stop or a signal. Raises StartupError when the engine ends by itself."""
        if not self._is_at_port:
            self._socket_path.unlink(missing_ok=True)
        if self._options.unverified:
            _logger.warning(
                "pulled KV blocks are used unproven: %s (kv_transfer.verify)",
                self._options.unverified,
            )
        child = await start_engine(self._command(), self._environment())
        _logger.info("started %s as process %d", self._options.command[0], child.pid)
        watches: list[asyncio.Task[None]] = []
        try:
            if self._desk is not None:
                await self._desk.open()
            if self._door is not None:
                self._registered_url = await self._door.open()
            self._register(listens=self._door is not None)
            watches = [
                self._supervised.spawn(self._fail_with(child)),
                self._supervised.spawn(self._watch()),
            ]
            await self._obey()
        finally:
            for task in watches:
                task.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            await self._canaries.close()
            for opened in (self._door, self._desk):
                if opened is not None:
                    await opened.close()
            await self._api.close()
            await stop_engine(child)
            self._side_channel.close()

    def _command(self) -> tuple[str, ...]:
        where = () if self._is_at_port else ("--uds", str(self._socket_path))
        events = f"ipc://{self._run_dir / self._name}.events"
        return (*with_events_at(self._options.command, events), *where)

    def _environment(self) -> dict[str, str]:
        own = engine_environment(self._run_dir, self._key, self._side_channel)
        if self._options.unverified:
            return own
        paths, is_far = os.environ.get("PYTHONPATH", ""), self._door is not None
        return own | connector_environment(self._run_dir, self._name, paths, is_far=is_far)

    def _register(self, *, listens: bool = True) -> None:
        """Tell where the engine is reached, and what it can do."""
        self._supervised.register(
            self._registered_url,
            self._capabilities,
            side_channel=tcp_endpoint(side_channel_host(), self._side_channel.getsockname()[1]),
            listens=listens,
        )

    async def _obey(self) -> None:
        """Do what the supervisor says until Stop. Raises the error of the engine."""
        while True:
            match await self._supervised.inbox.get():
                case Registry() as registry:
                    if self._desk is not None:
                        self._desk.learn(registry)
                    self._prove_pairs(registry)
                case Drain(timeout_s=timeout_s):
                    self._supervised.spawn(self._drain(timeout_s))
                case Stop():
                    return
                case PdlaunchError() as error:
                    raise error
                case Suspects() | Answered() | EngineIdle() | Happened():
                    pass  # said to routers alone

    def _fail(self, reason: str) -> None:
        self._supervised.inbox.put_nowait(StartupError(reason))

    async def _fail_with(self, child: asyncio.subprocess.Process) -> None:
        code = await child.wait()
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"exited with status {code}"
        )
        self._fail(f"{Path(self._options.command[0]).name} {how}")

    async def _drain(self, timeout_s: float) -> None:
        """Wait until the engine has nothing to do and lends nothing, at most ``timeout_s``."""
        ends_at = time.monotonic() + timeout_s
        while time.monotonic() < ends_at:
            try:
                if not is_vllm_busy(await self._api.counts(HEALTH_TIMEOUT_S)):
                    break
            except ProtocolError:
                break
            await asyncio.sleep(DRAIN_POLL_S)
        self._supervised.send(Drained())

    # Watching the engine

    async def _watch(self) -> None:
        """Say Ready once the engine is healthy; fail when it is not any more, or stands still."""
        self._supervised.send(Progress(text="vLLM is starting"))
        model_files = await asyncio.to_thread(self._options.model_files)
        while not await self._is_there():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(START_POLL_S)
        # Before Ready: what routers may ask of the engine from then on follows from its version.
        try:
            version = await self._api.version(HEALTH_TIMEOUT_S)
            self._capabilities = with_version(self._capabilities, version)
            self._register()
        except ProtocolError as error:
            _logger.warning("%s", error)
        # vLLM has read the files between the two looks at them.
        if changed := changes(model_files, await asyncio.to_thread(self._options.model_files)):
            self._fail(f"the model has changed while vLLM was starting: {changed}")
            return
        self._supervised.send(Ready(model=model_files))
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
            found = hangs.look(counts, is_probed=is_probed)
            if found == "idle":
                self._probe = self._supervised.spawn(self._send_probe())
            elif found == "hangs":
                hang_s = self._options.hang_timeout_s
                self._fail(f"it has requests and has computed nothing for {hang_s:g} s")
                return

    async def _is_there(self) -> bool:
        """Return whether the engine answers, and nobody else at its port, who would be given the
        key.
        """
        port = urlsplit(self._url).port if self._is_at_port else None
        if port is not None and (uid := foreign_listener(port)) is not None:
            self._fail(
                f"a program of another user (id {uid}) listens at port {port}, which is to be the "
                "engine's; free it, or choose another port"
            )
            return False
        return bool(await self._api.is_healthy(HEALTH_TIMEOUT_S))

    async def _send_probe(self) -> None:
        """Have the engine compute one token, so that it can be seen whether it still does."""
        body = {"prompt": [FIRST_TOKEN_ID], "max_tokens": 1, "temperature": 0}
        try:
            # Longer than the hang watch takes to find that the probe makes no progress.
            timeout_s = self._options.hang_timeout_s + 2 * HEALTH_TIMEOUT_S
            await self._api.complete({"model": self._options.model, **body}, timeout_s)
        except ProtocolError as error:
            _logger.warning("a probe of one token: %s", error)

    # Pairs, of decode engines

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
        # The supervisor has dropped these proofs: the pairs have to be proven anew.
        self._canaries.forget(self._canaries.pairs() - peers.keys() | self._listed - listed)
        self._listed, self._peers = listed, peers
        for entry in registry.entries:
            if entry.state == "sleeping" and (entry.name, entry.incarnation) in listed:
                self._doubt(entry.name, entry.incarnation, "it sleeps")
        self._canaries.prove(peers)

    async def _send_canary(self, peer: Peer) -> Proof:
        await self._is_ready.wait()
        url, options = self._peers[peer].address.http, self._options
        api = EngineApi(url, self._key)
        certificate = self._supervised.bootstrap.keys.certificate
        # All engines of a launch have doors, or none has.
        if self._door is not None and certificate is not None:
            token = self._supervised.bootstrap.keys.http_token
            api = EngineApi(url, token, client_context(certificate))
        try:
            async with self._one_at_a_time:
                return await send_canary(api, self._api, options.model, is_exact=options.is_exact)
        finally:
            await api.close()

    def _tell_proof(self, peer: Peer, result: Proof | CanaryDied) -> None:
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


class EngineHangWatch:
    """Finds out, look by look at an engine's counts, that it stands still.

    ::

        has work, counts progress ──> works      has work, no progress for timeout_s ──> hangs
        has no work for timeout_s ──> idle: whoever watches gives it some, and the next looks tell

    An engine whose core has stopped says that it is healthy, and that it has nothing to do.
    ``timeout_s``: 0 for an engine that never hangs nor idles.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._seen: tuple[float, bool] | None = None
        """Progress, and whether it has work."""
        self._since_at = 0.0
        """Instant since which it was seen so."""

    def look(self, counts: Counts, *, is_probed: bool) -> Found:
        """Judge it. ``is_probed``: it has work whatever it counts."""
        now_at = self._clock()
        has_work = is_probed or any(counts.total(name) for name in VLLM_RUNNING)
        seen = (sum(counts.total(name) for name in _PROGRESS), has_work)
        if seen != self._seen:
            self._seen, self._since_at = seen, now_at
        if not 0 < self._timeout_s < now_at - self._since_at:
            return "works"
        self._since_at = now_at
        return "hangs" if has_work else "idle"
