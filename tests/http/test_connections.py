import asyncio
import contextlib
import json
import resource
import socket
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from pdlaunch.errors import StartupError
from pdlaunch.http.connections import HttpRunner, fit
from tests.http.loop_clock import pass_time
from tests.router.fake_engine import until

REQUEST = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
WORK = REQUEST.replace(b"/health", b"/work")
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Server:
    """Answers /health at once and /work once ``go`` is set, or streams without end."""

    def __init__(self) -> None:
        self.go, self.gone = asyncio.Event(), asyncio.Event()
        self.num_working = 0
        self.streams = False

    async def health(self, _: web.Request) -> web.StreamResponse:
        return web.Response(text="ok")

    async def work(self, http: web.Request) -> web.StreamResponse:
        self.num_working += 1
        response = web.StreamResponse()
        if not self.streams:
            await self.go.wait()
            return web.Response(text="done")
        await response.prepare(http)
        try:
            while True:
                await response.write(b"x" * 65536)
        finally:
            self.gone.set()

    @contextlib.asynccontextmanager
    async def serving(
        self, *, max_connections: int = 100, reader_timeout_s: float = 60.0
    ) -> AsyncIterator[int]:
        app = web.Application()
        app.add_routes([web.get("/health", self.health), web.get("/work", self.work)])
        runner = HttpRunner(
            app, max_connections=max_connections, shutdown_timeout_s=0.1, idle_timeout_s=60.0
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        runner.drop_stalled_readers(reader_timeout_s)
        try:
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()


@contextlib.asynccontextmanager
async def connected(port: int, number: int) -> AsyncIterator[list[Connection]]:
    made = [await asyncio.open_connection("127.0.0.1", port) for _ in range(number)]
    try:
        yield made
    finally:
        for _, writer in made:
            writer.transport.abort()
        await asyncio.sleep(0)


async def ask(connection: Connection) -> int:
    reader, writer = connection
    writer.write(REQUEST)
    return int((await reader.readuntil(b"\r\n\r\n")).split()[1])


async def num_open(connections: list[Connection]) -> int:
    for reader, _ in connections:
        with contextlib.suppress(TimeoutError, ConnectionError):
            await asyncio.wait_for(reader.read(1), 0.01)
    return sum(not reader.at_eof() and reader.exception() is None for reader, _ in connections)


async def test_connections_that_say_nothing_or_half_a_header_are_closed() -> None:
    async with Server().serving() as port, connected(port, 3) as (silent, half, kept):
        half[1].write(REQUEST[:20])
        assert await ask(kept) == 200
        pass_time(60.0)
        for reader, _ in (silent, half):
            assert await reader.read() == b""
        assert await kept[0].read() == b"ok"


async def test_idle_connections_give_way_to_new_ones() -> None:
    async with (
        Server().serving(max_connections=8) as port,
        connected(port, 40) as idle,
        connected(port, 1) as (fresh,),
    ):
        assert await ask(fresh) == 200
        assert await num_open([*idle, fresh]) <= 8


async def test_connections_at_work_do_not_give_way_and_who_finds_no_other_is_told() -> None:
    server = Server()
    async with server.serving(max_connections=4) as port, connected(port, 4) as busy:
        for _, writer in busy:
            writer.write(WORK)
        await until(lambda: server.num_working == 4)
        async with connected(port, 3) as refused:
            for reader, writer in refused:
                writer.write(REQUEST)
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503")
                assert b"Retry-After: 1" in head
                assert json.loads(body)["error"]["code"] == "too_many_connections"
        server.go.set()
        for reader, _ in busy:
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")


async def test_a_reader_that_does_not_read_loses_its_place() -> None:
    server = Server()
    server.streams = True
    async with server.serving(reader_timeout_s=0.1) as port:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", port))
            client.sendall(WORK)
            await server.gone.wait()


def test_descriptors_are_shared_by_clients_and_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (512, 512))
    assert (fit(256), fit(256, num_each=4), fit(4096, num_others=224)) == (256, 112, 224)
    with pytest.raises(StartupError, match="may open 512 files, but needs 1065"):
        fit(7, num_others=1000)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert fit(4096, num_each=4) == 4096
