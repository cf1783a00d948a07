"""The real server process under a scripted supervisor and rank."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import msgspec
import psutil
import pytest
import pytest_asyncio
import zmq
import zmq.asyncio

from pdlaunch.engine.server.tokenizer import TextTokenizer
from pdlaunch.protocol.control import (
    Address,
    Capabilities,
    Drain,
    Drained,
    Entry,
    Failed,
    FromSupervisor,
    Progress,
    Ready,
    Register,
    Registry,
    Stop,
    ToSupervisor,
    from_supervisor,
    to_supervisor,
)
from pdlaunch.protocol.engine import AddRequest, Hello
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext, new_launch_keys
from tests.engine.server.conftest import engine_spec
from tests.engine.server.fake_rank import FakeRank, silent

pytestmark = pytest.mark.processes

TIMEOUT_S = 180


class FakeSupervisor:
    """Starts one server process and reads what it says."""

    def __init__(self, context: SecureContext, keys: LaunchKeys, folder: Path) -> None:
        self.context = context
        self.keys = keys
        self._folder = folder
        self._socket, self._endpoint = context.listen(
            zmq.ROUTER, "tcp://127.0.0.1:0", socket_class=zmq.asyncio.Socket
        )
        self._version = 0
        self.process: asyncio.subprocess.Process | None = None

    async def start(
        self, model_dir: Path, *, engine_api_key: str | None = None, **changes: object
    ) -> None:
        bootstrap = Bootstrap(
            name="prefill-0",
            incarnation=3,
            control=self._endpoint,
            keys=self.keys,
            run_dir=str(self._folder),
            log_level="debug",
            engine_api_key=engine_api_key,
            capabilities=Capabilities(gives_first_token=True),
            engine_json=engine_spec(model_dir, **changes).model_dump_json(),
        )
        command = [sys.executable, "-m", "pdlaunch.engine.server", "--name", "prefill-0"]
        with (self._folder / "server.log").open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stderr=log, start_new_session=True
            )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(bootstrap) + b"\n")
        await self.process.stdin.drain()

    async def say(self, message: FromSupervisor) -> None:
        await self._socket.send_multipart([b"prefill-0", from_supervisor.encode(message)])

    async def show_rank(self, rank: FakeRank | None, incarnation: int = 1) -> None:
        self._version += 1
        entries = []
        if rank is not None:
            address = Address(requests=rank.endpoint)
            entries = [
                Entry(
                    name="prefill-0/rank-0", kind="rank", incarnation=incarnation, address=address
                )
            ]
        await self.say(Registry(version=self._version, entries=entries))

    async def next(self) -> ToSupervisor:
        """The next message that is no Progress."""
        while True:
            identity, frame = await asyncio.wait_for(self._socket.recv_multipart(), TIMEOUT_S)
            assert identity == b"prefill-0"
            message = to_supervisor.decode(frame)
            if not isinstance(message, Progress):
                return message

    async def ended(self) -> int:
        assert self.process is not None
        return await asyncio.wait_for(self.process.wait(), TIMEOUT_S)

    async def close(self) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        self._socket.close()

    def log(self) -> str:
        return (self._folder / "server.log").read_text()


@pytest_asyncio.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[FakeSupervisor]:
    keys = new_launch_keys()
    context = SecureContext(keys)
    supervisor = FakeSupervisor(context, keys, tmp_path)
    yield supervisor
    await supervisor.close()
    context.close()


@pytest_asyncio.fixture
async def own_rank(supervisor: FakeSupervisor, tokenizer: TextTokenizer) -> AsyncIterator[FakeRank]:
    rank = FakeRank(supervisor.context, tokenizer)
    yield rank
    await rank.close()


async def get_status(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status


async def health_becomes(url: str, status: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while await get_status(url + "/health") != status:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)


async def complete(url: str, key: str) -> tuple[int, dict]:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
        session.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": 2}) as response,
    ):
        return response.status, await response.json()


async def many_connect_while_stopped(pid: int, url: str) -> None:
    """A burst of requests finds room in the backlog of a server that is busy."""
    port = urlsplit(url).port
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            made = await asyncio.gather(
                *(asyncio.open_connection("127.0.0.1", port) for _ in range(300))
            )
    finally:
        os.kill(pid, signal.SIGCONT)
    for _, writer in made:
        writer.close()


async def test_a_servers_life(
    supervisor: FakeSupervisor, own_rank: FakeRank, tokenizer: TextTokenizer, model_dir: Path
):
    await supervisor.start(model_dir)
    register = await supervisor.next()
    assert isinstance(register, Register)
    assert (register.name, register.incarnation) == ("prefill-0", 3)
    assert register.capabilities.gives_first_token
    url, token = register.address.http, supervisor.keys.http_token
    assert await get_status(url + "/health") == 503

    await supervisor.show_rank(own_rank)
    assert isinstance(await supervisor.next(), Ready)
    await own_rank.wait_for(Hello)
    assert await get_status(url + "/health") == 200
    assert (await complete(url, token))[0] == 200
    assert psutil.Process(register.pid).memory_info().rss < 150 * 1024**2
    await many_connect_while_stopped(register.pid, url)

    own_rank.script = silent
    lost = asyncio.create_task(complete(url, token))
    await own_rank.wait_for(AddRequest, 2)
    other = FakeRank(supervisor.context, tokenizer)
    await supervisor.show_rank(other, incarnation=2)
    assert (await lost)[0] == 503
    await other.wait_for(Hello)
    await health_becomes(url, 200)
    assert (await complete(url, token))[0] == 200

    await supervisor.show_rank(None)
    await health_becomes(url, 503)
    assert (await complete(url, token))[1]["error"]["code"] == "engine_starting"
    await supervisor.say(Drain(timeout_s=5))
    assert isinstance(await supervisor.next(), Drained)
    assert (await complete(url, token))[1]["error"]["code"] == "shutting_down"
    await supervisor.say(Stop())
    assert await supervisor.ended() == 0
    await other.close()
    assert "Traceback" not in supervisor.log()


async def test_a_broken_model_folder_is_reported(supervisor: FakeSupervisor, tmp_path: Path):
    await supervisor.start(tmp_path)
    assert isinstance(await supervisor.next(), Register)
    failed = await supervisor.next()
    assert isinstance(failed, Failed)
    assert "config.json" in failed.error
    assert await supervisor.ended() == 1


async def test_a_busy_port_is_named(supervisor: FakeSupervisor, model_dir: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        await supervisor.start(model_dir, http_port=port)
        failed = await supervisor.next()
    assert isinstance(failed, Failed)
    assert str(port) in failed.error
    assert await supervisor.ended() == 1


async def test_it_takes_the_keys_of_routers_alone_and_shows_none(
    supervisor: FakeSupervisor, own_rank: FakeRank, model_dir: Path
):
    await supervisor.start(model_dir, engine_api_key="of-another-router")
    register = await supervisor.next()
    assert isinstance(register, Register)
    await supervisor.show_rank(own_rank)
    assert isinstance(await supervisor.next(), Ready)
    url = register.address.http
    assert (await complete(url, supervisor.keys.public))[0] == 401
    assert (await complete(url, supervisor.keys.http_token))[0] == 200
    assert (await complete(url, "of-another-router"))[0] == 200
    process = psutil.Process(register.pid)
    shown = [supervisor.log(), *process.cmdline(), *process.environ().values()]
    for secret in (
        supervisor.keys.secret,
        supervisor.keys.public,
        supervisor.keys.http_token,
        "of-another-router",
    ):
        assert not any(secret in text for text in shown)


@pytest.mark.parametrize("how", ["SIGTERM", "the end of stdin"])
async def test_the_process_ends_with_its_supervisor(
    supervisor: FakeSupervisor, model_dir: Path, how: str
):
    await supervisor.start(model_dir)
    register = await supervisor.next()
    assert isinstance(register, Register)
    process = supervisor.process
    assert process is not None
    assert process.stdin is not None
    if how == "SIGTERM":
        os.kill(register.pid, signal.SIGTERM)
        assert await supervisor.ended() == 0
    else:
        process.stdin.close()
        assert await supervisor.ended() == -signal.SIGKILL
