import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
from msgspec import structs

from pdlaunch.errors import PdlaunchError, StartupError
from pdlaunch.http.kv_feed import KVFeed
from pdlaunch.http.lifecycle import Supervised
from pdlaunch.launch.sidecar.__main__ import SidecarProcess
from pdlaunch.launch.sidecar.door import Door
from pdlaunch.launch.sidecar.engine import HeadlessNode, SidecarOptions
from pdlaunch.protocol.control import (
    MODEL_CHANGED,
    Address,
    Capabilities,
    Drain,
    Drained,
    Entry,
    PairReady,
    PairSuspect,
    Ready,
    Registry,
    Role,
    SleepState,
    Stop,
    ToSupervisor,
)
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from tests.launch.sidecar.fake_vllm import BLOCK_SIZE, FakeVllm, listen
from tests.launch.sidecar.test_door import SPEC as DOOR
from tests.router.fake_engine import until

pytestmark = pytest.mark.processes
COMMAND = ("sh", "-c", "exec sleep 600", "sh", "--served-model-name", "m")
"""Stands for the engine's process; its socket belongs to the test."""


class FakeSupervisor:
    """Stands for ``Supervised``: keeps what the sidecar says."""

    def __init__(self, run_dir: Path) -> None:
        self.bootstrap = Bootstrap(
            name="decode-0",
            incarnation=1,
            control="",
            keys=new_launch_keys(),
            run_dir=str(run_dir),
            log_level="info",
            capabilities=Capabilities(kind="vllm"),
        )
        self.context = SecureContext(self.bootstrap.keys)
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.all_said: list[ToSupervisor] = []
        self.said: asyncio.Queue[ToSupervisor] = asyncio.Queue()
        self.capabilities: list[Capabilities] = []
        self.registered: list[Address] = []
        self.engine_ids: list[str] = []
        self.prefill: FakeVllm
        self.decode: FakeVllm
        self._tasks: set[asyncio.Task[None]] = set()

    def register(
        self,
        address: Address,
        capabilities: Capabilities | None = None,
        *,
        engine_id: str = "",
        listens: bool = True,
    ) -> None:
        self.registered.append(address)
        self.engine_ids.append(engine_id)
        self.capabilities.append(capabilities or self.bootstrap.capabilities)

    def send(self, message: ToSupervisor) -> None:
        self.said.put_nowait(message)
        self.all_said.append(message)

    obey, spawn = Supervised.obey, Supervised.spawn

    async def next(self, kind: type[Any]) -> Any:
        while not isinstance(said := await self.said.get(), kind):
            pass
        return said


def sidecar(supervisor: FakeSupervisor, *flags: str, hang_timeout_s: float = 0.0) -> SidecarProcess:
    options = SidecarOptions(
        (*COMMAND, *flags), is_exact=True, hang_timeout_s=hang_timeout_s, unverified="by a test"
    )
    return SidecarProcess(cast(Supervised, supervisor), options)


@contextlib.asynccontextmanager
async def watched(
    supervisor: FakeSupervisor,
    *flags: str,
    hang_timeout_s: float = 0.0,
    is_sleeping: bool | None = None,
) -> AsyncIterator[asyncio.Task[None]]:
    """Run a sidecar of a decode engine beside a prefill engine, both of them fakes."""
    running = asyncio.create_task(sidecar(supervisor, *flags, hang_timeout_s=hang_timeout_s).run())
    await asyncio.sleep(0)  # it removes what a predecessor has left at the socket's path
    shares: dict[str, list[int]] = {}
    supervisor.prefill = FakeVllm("prefill-0", shares)
    supervisor.decode = FakeVllm("decode-0", shares, is_sleeping=is_sleeping)
    folder = Path(supervisor.bootstrap.run_dir)
    runners = [
        await listen(engine, folder / f"{engine.name}.sock")
        for engine in (supervisor.prefill, supervisor.decode)
    ]
    yield running
    supervisor.inbox.put_nowait(Stop())
    with contextlib.suppress(StartupError):
        await running
    for runner in runners:
        await runner.cleanup()
    supervisor.context.close()


@pytest.fixture(autouse=True)
def frequent_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdlaunch.launch.sidecar.__main__.WATCH_POLL_S", 0.02)
    monkeypatch.setattr("pdlaunch.launch.sidecar.__main__.DRAIN_POLL_S", 0.01)


@pytest_asyncio.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[FakeSupervisor]:
    supervisor = FakeSupervisor(tmp_path)
    async with watched(supervisor):
        yield supervisor


def registry(run_dir: str, *pairs: PairReady, url: str = "", state: str = "ready") -> Registry:
    def entry(role: Role, url: str = "", state: str = "ready") -> Entry:
        name = f"{role}-0"
        address = Address(http=url or f"unix:{run_dir}/{name}.sock")
        return Entry(
            name=name, kind="server", incarnation=1, role=role, address=address, state=state
        )

    entries = [entry("prefill", url, state), entry("decode")]
    return Registry(version=1, entries=entries, pairs=list(pairs))


async def test_vllm_on_a_further_host_is_not_started_with_another_model_than_the_launch_has(
    tmp_path: Path,
) -> None:
    command, started, config = (tmp_path / name for name in ("vllm", "started", "config.json"))
    command.write_text(f"#!/bin/sh\ntouch {started}\n")
    command.chmod(0o755)
    config.write_text("{}")
    supervisor = FakeSupervisor(tmp_path)
    supervisor.bootstrap = structs.replace(supervisor.bootstrap, pinned={config.name: "other"})
    options = SidecarOptions(
        (str(command), "serve", str(tmp_path)), is_exact=True, hang_timeout_s=0.0, unverified=""
    )
    with pytest.raises(PdlaunchError, match=f"{MODEL_CHANGED}: config.json"):
        await HeadlessNode(cast(Supervised, supervisor), options).run()
    assert not started.exists()
    supervisor.context.close()


async def test_on_several_hosts_it_opens_a_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch's token opens the prefill engine to the canary of the decode engine's sidecar."""
    feed = KVFeed()
    monkeypatch.setattr("pdlaunch.launch.sidecar.__main__.KVFeed", lambda _: feed)
    keys = new_launch_keys(with_certificate=True)
    supervisor = FakeSupervisor(tmp_path)
    supervisor.bootstrap = structs.replace(supervisor.bootstrap, keys=keys, door=DOOR)
    prefill = Door("prefill-0", DOOR, keys, f"unix:{tmp_path}/prefill-0.sock", None, KVFeed())
    url = await prefill.open()
    async with watched(supervisor):
        await supervisor.next(Ready)
        assert feed.num_tokens == 40 * BLOCK_SIZE
        told = zip(supervisor.registered, supervisor.capabilities, strict=True)
        for address, capabilities in told:
            assert address.http.startswith("https://127.0.0.1:")
            assert capabilities.takes_launch_token
        supervisor.inbox.put_nowait(registry(str(tmp_path), url=url))
        assert (await supervisor.next(PairReady)).peer == "prefill-0"
    await prefill.close()


STRANGER = """
import os, socket
os.setgid(65534); os.setuid(65534)
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    server.accept()
    print("somebody has come", flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_users_program_at_a_fixed_port_is_told_nothing(tmp_path: Path) -> None:
    """It listens before vLLM does, which takes long to start, and would be given the key."""
    stranger = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", STRANGER), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert stranger.stdout is not None
        port = (await stranger.stdout.readline()).decode().strip()
        process = sidecar(FakeSupervisor(tmp_path), "--host", "127.0.0.1", "--port", port)
        with pytest.raises(StartupError, match=rf"user \(id 65534\) listens at port {port}"):
            await process.run()
    finally:
        stranger.kill()
    assert await stranger.stdout.read() == b"", "nobody has come"
    await stranger.wait()


async def test_a_pair_is_proven_once_and_again_when_its_proof_is_dropped(
    supervisor: FakeSupervisor,
) -> None:
    run_dir, prefill = supervisor.bootstrap.run_dir, supervisor.prefill
    supervisor.inbox.put_nowait(registry(run_dir))
    first = await supervisor.next(PairReady)
    # Registries from before the proof was listed are no doubt of it.
    for listed in (registry(run_dir), registry(run_dir, first), registry(run_dir, first)):
        supervisor.inbox.put_nowait(listed)
    supervisor.inbox.put_nowait(registry(run_dir))
    assert (await supervisor.next(PairReady)).peer == "prefill-0"
    # Each canary asks it for the first token and for all, and nobody has sent a third one.
    assert len(prefill.bodies) == 4


async def test_reads_that_fail_without_one_that_comes_through_are_a_doubt(
    supervisor: FakeSupervisor,
) -> None:
    run_dir, decode = supervisor.bootstrap.run_dir, supervisor.decode
    supervisor.inbox.put_nowait(registry(run_dir))
    supervisor.inbox.put_nowait(registry(run_dir, await supervisor.next(PairReady)))
    looks_of_canary = decode.num_looks
    await until(lambda: decode.num_looks >= looks_of_canary + 1)
    looks = decode.num_looks
    # A failure beside READs that come through is one request's own.
    decode.num_failed_reads, decode.num_bytes = 1, decode.num_bytes + 1
    await until(lambda: decode.num_looks >= looks + 2)
    assert supervisor.said.empty()
    decode.num_failed_reads = 2
    doubt = await supervisor.next(PairSuspect)
    assert (doubt.local, doubt.peer, doubt.peer_incarnation) == ("decode-0", "prefill-0", 1)


async def test_a_drain_waits_for_requests_and_then_for_leases(supervisor: FakeSupervisor) -> None:
    """Decode engines read the blocks of requests that prefill has done with."""
    await supervisor.next(Ready)
    engine = supervisor.decode
    engine.num_running, engine.lends = 1, 0.25
    supervisor.inbox.put_nowait(Drain(timeout_s=600))

    async def is_looked_at() -> None:
        # The watch looks too: of so many looks some are the drain's.
        before = engine.num_looks
        await until(lambda: engine.num_looks > before + 8)

    await is_looked_at()
    engine.num_running = 0
    await is_looked_at()
    said = [supervisor.said.get_nowait() for _ in range(supervisor.said.qsize())]
    assert Drained() not in said
    engine.lends = 0.0
    await supervisor.next(Drained)


async def test_an_idle_engine_whose_core_stands_still_is_found(tmp_path: Path) -> None:
    """Nobody asks it for anything, and it says that it is healthy and has nothing to do."""
    supervisor = FakeSupervisor(tmp_path)
    async with watched(supervisor, hang_timeout_s=2.0) as running:
        engine = supervisor.decode
        await until(lambda: len(engine.bodies) == 2)
        asked = [(len(body["prompt"]), body["max_tokens"]) for body in engine.bodies]
        assert asked == [(1, 1)] * 2
        assert not running.done()
        engine.moves.clear()
        with pytest.raises(StartupError, match="has computed nothing for"):
            await running
        engine.moves.set()


async def test_an_engine_whose_core_has_ended_is_told_to_be_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdlaunch.launch.sidecar.__main__.END_TIMEOUT_S", 0.05)
    supervisor = FakeSupervisor(tmp_path)
    async with watched(supervisor) as running:
        await supervisor.next(Ready)
        supervisor.decode.healthy = False
        with pytest.raises(StartupError, match="its engine core is dead"):
            await running


async def test_an_engine_that_sleeps_is_told_until_it_is_awake(tmp_path: Path) -> None:
    supervisor = FakeSupervisor(tmp_path)
    async with watched(supervisor, "--enable-sleep-mode", is_sleeping=False):
        await supervisor.next(Ready)
        engine = supervisor.decode
        for is_sleeping, state in ((True, "sleeping"), (False, "awake")):
            engine.is_sleeping = is_sleeping
            assert (await supervisor.next(SleepState)).state == state
        engine.is_sleeping = None  # it does not answer; nothing is known
        looks = engine.num_looks
        await until(lambda: engine.num_looks >= looks + 3)
        assert supervisor.said.empty()
