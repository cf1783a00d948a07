"""The real process under a supervisor that the test plays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from pdlaunch.protocol.control import (
    Drain,
    Drained,
    EngineIdle,
    FromSupervisor,
    Ready,
    Register,
    Registry,
    Stop,
    ToSupervisor,
    from_supervisor,
    to_supervisor,
)
from pdlaunch.protocol.process.bootstrap import Bootstrap, RouterSpec
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from tests.router.conftest import SPEC
from tests.router.fake_engine import FakeEngine
from tests.router.test_life_of_a_request import completion, expected_text

pytestmark = pytest.mark.processes

MAX_RESIDENT_BYTES = 90 * 1024**2
"""The promise of the project for a router."""
TIMEOUT_MS = 60_000
JSON = {"Content-Type": "application/json"}


class Supervisor:
    """The other end of the control channel, and the children it started."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.keys = new_launch_keys()
        self._context = SecureContext(self.keys)
        self._socket, self._endpoint = self._context.listen(zmq.ROUTER, "tcp://127.0.0.1:0")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, spec: RouterSpec = SPEC) -> subprocess.Popen[bytes]:
        port = self._listener.getsockname()[1]
        spec = msgspec.structs.replace(spec, port=port, listeners=(self._listener.fileno(),))
        bootstrap = Bootstrap(
            name="router",
            incarnation=1,
            control=self._endpoint,
            keys=self.keys,
            run_dir=str(self._run_dir),
            log_level="info",
            router=spec,
        )
        child = subprocess.Popen(
            [sys.executable, "-m", "pdlaunch.router", "--name", "router"],
            stdin=subprocess.PIPE,
            start_new_session=True,
            pass_fds=spec.listeners,
        )
        self.children.append(child)
        assert child.stdin is not None
        child.stdin.write(msgspec.json.encode(bootstrap) + b"\n")
        child.stdin.flush()
        return child

    def receive(self) -> ToSupervisor:
        assert self._socket.poll(TIMEOUT_MS)
        name, frame = self._socket.recv_multipart()
        assert name == b"router"
        return to_supervisor.decode(frame)

    def receive_register(self) -> Register:
        """Answered with a registry, without which it accepts no client."""
        registered = self.receive()
        assert isinstance(registered, Register)
        self.send(Registry(version=0, entries=[], serving=False))
        return registered

    def has_clients_waiting(self) -> bool:
        """Somebody has connected whom no router has accepted."""
        return bool(select.select([self._listener], [], [], 0)[0])

    def send(self, message: FromSupervisor) -> None:
        self._socket.send_multipart([b"router", from_supervisor.encode(message)])

    def kill_children(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()
            assert child.stdin is not None
            child.stdin.close()

    def close(self) -> None:
        self.kill_children()
        self._context.close()
        self._listener.close()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    yield supervisor
    supervisor.close()


@contextlib.asynccontextmanager
async def serving(supervisor: Supervisor, *engines: FakeEngine) -> AsyncIterator[None]:
    """They stop when no router is left: whom a server accepts while it stops is never let go."""
    for engine in engines:
        await engine.start()
    try:
        yield
    finally:
        await asyncio.to_thread(supervisor.kill_children)
        for engine in engines:
            await engine.stop()


def fetch(url: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data=data, headers=JSON), timeout=120
        ) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def fetch_text(url: str) -> str:
    with urllib.request.urlopen(url, timeout=120) as response:
        text: str = response.read().decode()
    return text


async def test_its_life_from_register_to_stop(supervisor: Supervisor) -> None:
    child = supervisor.start()
    registered = await asyncio.to_thread(supervisor.receive_register)
    assert (registered.name, registered.incarnation, registered.pid) == ("router", 1, child.pid)
    url = registered.address.http
    ready = await asyncio.to_thread(supervisor.receive)
    assert ready == Ready()
    status, health = await asyncio.to_thread(fetch, f"{url}/health")
    assert (status, health["status"]) == (503, "starting")

    engines = [FakeEngine("prefill-0", "prefill"), FakeEngine("decode-0", "decode")]
    async with serving(supervisor, *engines):
        partial = [
            entry for engine in engines for entry in engine.entries(ready=engine.role == "prefill")
        ]
        supervisor.send(Registry(version=1, entries=partial, serving=False))
        while (await asyncio.to_thread(fetch, f"{url}/health"))[1]["engines"] == {}:
            pass
        assert (await asyncio.to_thread(fetch, f"{url}/health"))[0] == 503
        supervisor.send(
            Registry(version=2, entries=[entry for engine in engines for entry in engine.entries()])
        )
        while (await asyncio.to_thread(fetch, f"{url}/health"))[0] != 200:
            pass
        status, answer = await asyncio.to_thread(fetch, f"{url}/v1/completions", completion())
        assert (status, answer["choices"][0]["text"]) == (200, expected_text("hello", 6))
        for _ in range(3):
            assert "pdlaunch_kv_transfer_bytes_total" in await asyncio.to_thread(
                fetch_text, f"{url}/metrics"
            )
        assert psutil.Process(child.pid).memory_info().rss <= MAX_RESIDENT_BYTES

        engines[1].hold_after = 1
        running = asyncio.ensure_future(
            asyncio.to_thread(fetch, f"{url}/v1/completions", completion())
        )
        await engines[1].holding.wait()
        # Asked first, answered last: decode-0 still works.
        for name in ("decode-0", "nobody"):
            supervisor.send(EngineIdle(engine=name))
        assert await asyncio.to_thread(supervisor.receive) == EngineIdle(engine="nobody")
        supervisor.send(Drain(timeout_s=30.0))
        while (await asyncio.to_thread(fetch, f"{url}/health"))[1]["status"] != "draining":
            pass
        assert (await asyncio.to_thread(fetch, f"{url}/v1/completions", completion()))[0] == 503
        engines[1].go.set()
        assert (await running)[0] == 200
        told = [await asyncio.to_thread(supervisor.receive) for _ in range(2)]
        assert Drained() in told
        assert EngineIdle(engine="decode-0") in told
        supervisor.send(Stop())
        assert await asyncio.to_thread(child.wait, 120) == 0


async def test_a_client_that_came_before_the_registry_is_heard_after_it(
    supervisor: Supervisor,
) -> None:
    """It waited for this router, and shall not hear that the deployment is starting."""
    supervisor.start()
    registered = await asyncio.to_thread(supervisor.receive)
    assert isinstance(registered, Register)
    asked = asyncio.ensure_future(asyncio.to_thread(fetch, f"{registered.address.http}/health"))
    while not supervisor.has_clients_waiting():  # noqa: ASYNC110 - the kernel tells nobody
        await asyncio.sleep(0.01)
    engine = FakeEngine("decode-0", "decode")
    async with serving(supervisor, engine):
        supervisor.send(Registry(version=1, entries=engine.entries()))
        assert (await asked)[1] == {"status": "ok", "engines": {"decode-0": "ready"}}
