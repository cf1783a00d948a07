"""Runs one engine of vLLM: ``python -m pdlaunch.launch.sidecar --name NAME [OPTIONS] -- COMMAND``.

``COMMAND`` starts the engine. The supervisor starts and steers the sidecar.

::

    start the engine -> Register -> healthy, ranks up? ──> Ready -> watch ──> Drain -> Stop
         Registry: ranks of prefill engines ──> handshakes of decode ranks ──> a canary through each
         engine ──> PairReady    (decode engines)
    the engine ends, or stands still ──> Failed: the supervisor starts both anew
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from pdlaunch.config.model_files.identity import changes, model_digest
from pdlaunch.errors import ProtocolError, StartupError
from pdlaunch.http.engine_calls import UNIX
from pdlaunch.http.kv_feed import KVFeed
from pdlaunch.http.lifecycle import Supervised, run_supervised
from pdlaunch.http.watch.canary import FIRST_TOKEN_ID, Canaries, CanaryDied, Proof, send_canary
from pdlaunch.http.watch.engine_api import (
    VLLM_RUNNING,
    Counts,
    EngineApi,
    FailedReads,
    is_vllm_busy,
    with_version,
)
from pdlaunch.launch.sidecar.door import Door
from pdlaunch.launch.sidecar.engine import (
    EngineOutput,
    HeadlessNode,
    SidecarOptions,
    connector_environment,
    end_of,
    engine_environment,
    guard_group,
    hold_side_channel,
    side_channel_host,
    start_engine,
    stop_engine,
    with_events_at,
)
from pdlaunch.launch.sidecar.kv_events import VllmKVEvents, listen_for_routers
from pdlaunch.launch.sidecar.link import EngineLink, Peer, RankPairs
from pdlaunch.machine.network import foreign_listener
from pdlaunch.machine.ucx_log import ReadTransports, path_over
from pdlaunch.protocol.certificates import client_context
from pdlaunch.protocol.control import (
    Address,
    Drained,
    Entry,
    PairFailed,
    PairReady,
    PairSuspect,
    Progress,
    Ready,
    Registry,
    SleepState,
)
from pdlaunch.protocol.engine_link import (
    PullFailure,
    RankUp,
    dp_size_of,
    engine_of_rank,
    rank_entries,
)
from pdlaunch.protocol.ids import EngineId

_logger = logging.getLogger("pdlaunch.launch.sidecar")  # not __main__, whose infos are not logged

START_POLL_S = 0.5
WATCH_POLL_S = 2.0
DRAIN_POLL_S = 0.5
HEALTH_TIMEOUT_S = 30.0
END_TIMEOUT_S = 2.0  # of an engine that is not healthy any more, as when its core has ended
SLEEP_FLAG = "--enable-sleep-mode"
_PROGRESS = ("vllm:generation_tokens_total", "vllm:iteration_tokens_total_sum")
Found = Literal["works", "idle", "hangs"]


class SidecarProcess:
    """Speaks for one engine of vLLM; made inside a running event loop, ``run`` once."""

    def __init__(self, supervised: Supervised, options: SidecarOptions) -> None:
        self._supervised = supervised
        self._options = options
        self._transports = ReadTransports()
        bootstrap = supervised.bootstrap
        self._keys, spec = bootstrap.keys, bootstrap.door
        self._name, self._run_dir = bootstrap.name, Path(bootstrap.run_dir)
        self._key = bootstrap.engine_api_key
        self._socket_path = self._run_dir / f"{self._name}.sock"
        self._port = options.value("--port")  # empty: it listens at the socket
        at_port = f"http://{options.value('--host')}:{self._port}"
        self._url = at_port if self._port else f"{UNIX}{self._socket_path}"
        self._api = EngineApi(self._url, self._key)
        self._kv_feed = KVFeed()
        self._kv_socket_path = self._run_dir / f"{self._name}.kv.sock"
        self._door: Door | None = None
        if spec is not None:
            self._door = Door(self._name, spec, self._keys, self._url, self._key, self._kv_feed)
        # None: the engine has vLLM's own connector, or none.
        self._link: EngineLink | None = None
        if (connector := bootstrap.connector) is not None:
            self._link = EngineLink(
                supervised.context, bootstrap, connector, over_hosts=options.spans_hosts
            )
        self._output = EngineOutput()
        self._model_files: dict[str, str] = {}
        """Digests of the model's files before vLLM was started."""
        self._registered_url = self._url  # or the URL of the door, if there is one
        self._capabilities = msgspec.structs.replace(
            bootstrap.capabilities, takes_launch_token=self._door is not None
        )
        ports = "" if spec is None else spec.data_ports
        is_stock = self._link is None
        self._side_channel = hold_side_channel(side_channel_host(), ports) if is_stock else None
        # Where vLLM's ranks on all hosts of the engine meet.
        self._meeting: socket.socket | None = None
        if options.spans_hosts:
            self._meeting = hold_side_channel(options.value("--master-addr"), ports)
        self._is_ready = asyncio.Event()
        self._probe: asyncio.Task[None] | None = None  # asks an engine that was idle for a token
        # Of decode engines: prefill engines by name and incarnation.
        self._canaries = Canaries(self._send_canary, self._tell_proof)
        self._one_at_a_time = asyncio.Semaphore(1)
        self._peers: dict[Peer, Entry] = {}
        self._registry: Registry | None = None
        self._listed: set[Peer] = set()  # those that the registry lists as proven
        self._rank_pairs = RankPairs()
        self._failed_reads = FailedReads()
        self._failed_pulls: dict[str, list[str]] = defaultdict(list)  # errors, by prefill engine

    async def run(self) -> None:
        """Run until Stop or a signal. Raises StartupError when the engine ends by itself."""
        if not self._port:
            self._socket_path.unlink(missing_ok=True)
        if self._options.unverified:
            reason = self._options.unverified
            _logger.warning("pulled KV blocks are used unproven: %s", reason)
        # Digests before vLLM reads the files; those after its start must be equal.
        self._model_files = await asyncio.to_thread(self._options.model_files)
        if not self._model_files:
            _logger.warning("vLLM downloads the model itself: changes of its files are not noticed")
        command = self._command()
        child = await start_engine(command, self._environment())
        _logger.info("started %s as process %d", self._options.command[0], child.pid)
        watches: list[asyncio.Task[None]] = []
        kv_events = VllmKVEvents(command, self._kv_feed)
        kv_runner = await listen_for_routers(self._kv_socket_path, self._kv_feed)
        try:
            if self._door is not None:
                self._registered_url = await self._door.open()
            self._register(listens=self._door is not None)
            watches = [
                self._supervised.spawn(self._fail_with(child)),
                self._supervised.spawn(self._watch(child)),
                self._supervised.spawn(kv_events.run()),
            ]
            if self._link is not None:
                watches.append(self._supervised.spawn(self._heed_workers(self._link)))
            await self._supervised.obey(self._learn, self._drain)
        finally:
            for task in watches:
                task.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            await self._canaries.close()
            kv_events.close()
            self._kv_feed.close()
            await kv_runner.cleanup()
            if self._door is not None:
                await self._door.close()
            await self._api.close()
            await stop_engine(child)
            for opened in (self._link, self._side_channel, self._meeting):
                if opened is not None:
                    opened.close()

    def _command(self) -> tuple[str, ...]:
        where = () if self._port else ("--uds", str(self._socket_path))
        events = f"ipc://{self._run_dir / self._name}.events"
        port = ("--master-port", str(self._master_port)) if self._master_port else ()
        return (*with_events_at(self._options.command, events), *where, *port)

    @property
    def _master_port(self) -> int:
        return self._meeting.getsockname()[1] if self._meeting is not None else 0

    def _environment(self) -> dict[str, str]:
        own = engine_environment(self._run_dir, self._key, self._side_channel)
        if self._link is None:
            return own
        setup = self._link.write_setup(model_digest(self._model_files) if self._model_files else "")
        return own | connector_environment(self._run_dir, setup, os.environ.get("PYTHONPATH", ""))

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
        self._fail(end_of(self._options, await child.wait(), self._output))

    async def _drain(self, timeout_s: float) -> None:
        with contextlib.suppress(ProtocolError, TimeoutError):
            async with asyncio.timeout(timeout_s):
                while is_vllm_busy(await self._api.counts(HEALTH_TIMEOUT_S)):  # noqa: ASYNC110
                    await asyncio.sleep(DRAIN_POLL_S)
        self._supervised.send(Drained())

    # Watching the engine

    async def _watch(self, child: asyncio.subprocess.Process) -> None:
        """Say Ready once the engine is healthy; fail when it is not any more, or stands still."""
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
                    # Its end is told by ``_fail_with``, which says why.
                    await asyncio.wait_for(child.wait(), END_TIMEOUT_S)
                    return
                # An engine whose core has ended says so before it ends itself, if it does.
                cause = self._output.cause()
                dead = f"its core is dead: {cause.error if cause else '/health is not 200'}"
                late = f"/health did not answer within {HEALTH_TIMEOUT_S:g} s"
                self._fail(late if healthy is None else dead)
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

    async def _become_ready(self) -> bool:
        """Wait until the engine is healthy, and say Ready; False: the model has changed."""
        self._supervised.send(Progress(text="vLLM is starting"))
        while not await self._is_there():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(START_POLL_S)
        if self._link is not None and not self._link.all_up.is_set():
            self._supervised.send(Progress(text=self._link.progress))
            await self._link.all_up.wait()
        # Before Ready: what routers may ask of the engine from then on follows from its version.
        try:
            version = await self._api.version(HEALTH_TIMEOUT_S)
            self._capabilities = with_version(self._capabilities, version)
        except ProtocolError as error:
            _logger.warning("%s", error)
        self._register()
        if changed := changes(
            self._model_files, await asyncio.to_thread(self._options.model_files)
        ):
            self._fail(f"the model has changed while vLLM was starting: {changed}")
            return False
        self._supervised.send(Ready(model=self._model_files))
        self._is_ready.set()
        await self._tell_peers()
        return True

    async def _is_there(self) -> bool:
        """Return whether the engine itself answers at its port: it is given the key."""
        if self._port and (uid := foreign_listener(int(self._port))) is not None:
            self._fail(
                f"a program of another user (id {uid}) listens at port {self._port}, which is to "
                "be the engine's; free it, or choose another port"
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

    # Workers and pairs

    async def _heed_workers(self, link: EngineLink) -> None:
        """Take what workers say. Ends when the engine has to."""
        while True:
            try:
                message = await link.receive()
            except ProtocolError as error:
                self._fail(f"{self._name} cannot exchange KV blocks: {error}")
                return
            match message:
                case RankUp():
                    if self._is_ready.is_set():
                        self._register()
                    else:
                        self._supervised.send(Progress(text=link.progress))
                case PullFailure(peer_engine=engine, error=reason):
                    self._failed_pulls[engine].append(reason)
                case SleepState():
                    self._supervised.send(message)
                case PairReady():
                    self._rank_pairs.add(message)
                    self._prove_pairs()
                case PairFailed(peer=rank):
                    self._rank_pairs.drop(message)
                    self._prove_pairs()
                    names = {"local": self._name, "peer": engine_of_rank(rank)}
                    self._supervised.send(msgspec.structs.replace(message, **names))

    def _doubt_pairs(self, counts: Counts) -> None:
        """Have pairs proven anew over which READs have failed since the last look.

        pdlaunch's connector tells which these are; vLLM's does not, so that all are in doubt when
        no READ has come through: prompts that were handed over are computed here.
        """
        none_comes = self._link is None and self._failed_reads.look(counts)
        failed, self._failed_pulls = self._failed_pulls, defaultdict(list)
        for peer in self._listed:
            if none_comes:
                self._doubt(peer, "READs of KV blocks fail, and none comes through")
            elif errors := failed.get(peer[0]):
                self._doubt(peer, f"{len(errors)} pulls have failed just now: {errors[-1]}")

    def _doubt(self, peer: Peer, error: str) -> None:
        name, incarnation = peer
        _logger.warning("%s -> %s: %s", name, self._name, error)
        self._supervised.send(
            PairSuspect(local=self._name, peer=name, peer_incarnation=incarnation, error=error)
        )

    async def _tell_peers(self) -> None:
        """Tell workers of other ranks, once ready: vLLM must not be disturbed before."""
        if self._link is not None and self._registry is not None and self._is_ready.is_set():
            others = (entry for entry in self._registry.entries if entry.name != self._name)
            await self._link.tell_peers(rank_entries(others))

    async def _learn(self, registry: Registry) -> None:
        """Take in who is there. Of a decode engine: find the pairs to prove, and forget those whose
        prefill engine is gone or whose proof was dropped.
        """
        self._registry = registry
        await self._tell_peers()
        entries = {entry.name: entry for entry in registry.entries}
        if self._name not in entries or entries[self._name].role != "decode":
            return
        prefill = {
            (entry.name, entry.incarnation): entry
            for entry in registry.entries
            if entry.kind == "server" and entry.role == "prefill"
        }
        self._peers = {peer: entry for peer, entry in prefill.items() if entry.state == "ready"}
        # Memory of an engine that sleeps is let go, and its ranks shake hands again.
        self._rank_pairs.keep([peer for peer in prefill if prefill[peer].state != "sleeping"])
        listed = {(p.peer, p.peer_incarnation) for p in registry.pairs if p.local == self._name}
        # The supervisor has dropped these proofs: the pairs have to be proven anew.
        gone = self._canaries.pairs() - self._peers.keys()
        self._canaries.forget(gone | self._listed - listed)
        self._listed = listed
        for peer in listed & prefill.keys():
            if prefill[peer].state == "sleeping":
                self._doubt(peer, "it sleeps")
        self._prove_pairs()

    def _prove_pairs(self) -> None:
        """Send a canary through each prefill engine without one, once all ranks are joined."""
        self._canaries.prove([peer for peer in self._peers if self._is_joined(peer)])

    def _is_joined(self, peer: Peer) -> bool:
        return self._link is None or self._slowest(self._link, peer) is not None

    def _slowest(self, link: EngineLink, peer: Peer) -> PairReady | None:
        return self._rank_pairs.slowest(peer, link.names, dp_size_of(self._peers[peer]))

    async def _send_canary(self, peer: Peer) -> Proof:
        await self._is_ready.wait()
        url, options = self._peers[peer].address.http, self._options
        api, certificate = EngineApi(url, self._key), self._keys.certificate
        # All engines of a launch have doors, or none has.
        if self._door is not None and certificate is not None:
            api = EngineApi(url, self._keys.http_token, client_context(certificate))
        try:
            async with self._one_at_a_time:
                # The worst pair of data parallel ranks decides for the pair of engines.
                proofs = [
                    await send_canary(
                        api, self._api, options.model, is_exact=options.is_exact, dp_ranks=dp_ranks
                    )
                    for dp_ranks in self._dp_pairs(peer)
                ]
                return min(proofs, key=lambda proof: proof.gigabytes_per_s or 0.0)
        finally:
            await api.close()

    def _dp_pairs(self, peer: Peer) -> list[tuple[int, int] | None]:
        """Return the pairs of data parallel ranks, prefill first; [None]: each side has one."""
        theirs = dp_size_of(self._peers[peer])
        ours = 1 if self._link is None else self._link.dp_size
        if theirs == ours == 1:
            return [None]
        return [(their, our) for their in range(theirs) for our in range(ours)]

    def _tell_proof(self, peer: Peer, result: Proof | CanaryDied) -> None:
        name, incarnation = peer
        if isinstance(result, CanaryDied):
            self._supervised.send(
                PairFailed(local=self._name, peer=name, error=str(result), fatal=result.fatal)
            )
            return
        proof = PairReady(
            local=self._name,
            peer=name,
            peer_incarnation=incarnation,
            seconds=result.seconds,
            path=path_over("nixl/vLLM", self._transports.latest()),
            gigabytes_per_s=result.gigabytes_per_s,
        )
        if self._link is not None:
            slowest = self._slowest(self._link, peer)
            assert slowest is not None, "canaries of other pairs are stopped"
            proof = msgspec.structs.replace(slowest, local=self._name, peer=name, num_peers=1)
        self._supervised.send(proof)


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
        self._seen: tuple[float, bool] | None = None  # progress, and whether it has work
        self._since_at = 0.0  # instant since which it was seen so

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


async def _serve(supervised: Supervised) -> None:
    own_end = sys.argv.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--name")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--unverified", default="")
    parser.add_argument("--hang-timeout", type=float, default=0.0)
    found = parser.parse_args(sys.argv[1:own_end])
    options = SidecarOptions(
        command=tuple(sys.argv[own_end + 1 :]),
        is_exact=found.exact,
        hang_timeout_s=found.hang_timeout,
        unverified=found.unverified,
    )
    process = HeadlessNode if "--headless" in options.command else SidecarProcess
    await process(supervised, options).run()


if __name__ == "__main__":
    guard = guard_group()
    sys.exit(run_supervised(_serve))
