"""Names that no name server answers delay neither other names nor the end of a process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pdlaunch.http.engine_calls import EngineCalls
from pdlaunch.http.lookups import look_up
from pdlaunch.router.membership_sources import resolve_name
from tests.http.engine_calls.server import WHOLE, Call, Server
from tests.router.fake_engine import until

NUM_DEAD = 40
"""More than an event loop has threads."""


class NameServer:
    """Answers names that end in .dead once ``answers`` is set, with an error, and others at once.

    ``asked`` holds the threads that wait for it.
    """

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.asked: list[threading.Thread] = []
        self._resolve = socket.getaddrinfo

    def __call__(self, host: str, *arguments: Any, **options: Any) -> Any:
        if host.endswith(".dead"):
            self.asked.append(threading.current_thread())
            self.answers.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "nobody has answered")
        return self._resolve(host, *arguments, **options)


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[NameServer]:
    names = NameServer()
    monkeypatch.setattr(socket, "getaddrinfo", names)
    yield names
    names.answers.set()


async def test_names_that_nobody_answers_delay_no_other_one(names: NameServer) -> None:
    server, loop = Server(), asyncio.get_running_loop()
    server.says = WHOLE
    calls = EngineCalls(60.0)
    async with await loop.create_server(server, "127.0.0.1", 0) as listening:
        call = Call(server, f"http://localhost:{listening.sockets[0].getsockname()[1]}")
        dead = [
            asyncio.ensure_future(calls.call(f"http://{number}.dead:80", "GET", "/", {}, b""))
            for number in range(NUM_DEAD)
        ]
        dead += [asyncio.ensure_future(resolve_name("name.dead", 80))]
        await asyncio.sleep(0)
        assert await call.answered() == b"ok"
        assert "127.0.0.1" in await resolve_name("localhost", 80)
        await until(lambda: len(names.asked) == NUM_DEAD + 1)
        names.answers.set()
        for error in await asyncio.gather(*dead, return_exceptions=True):
            assert "nobody has answered" in str(error)
        call.calls.close()


async def test_a_name_is_not_looked_up_again_while_its_lookup_runs(names: NameServer) -> None:
    calls = EngineCalls(60.0)
    for _ in range(3):
        calling = asyncio.ensure_future(calls.call("http://a.dead:80", "GET", "/", {}, b""))
        await until(lambda: names.asked)
        calling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await calling
    assert len(names.asked) == 1


async def test_the_end_of_a_process_waits_for_no_lookup(names: NameServer) -> None:
    async def ask() -> None:
        asking = asyncio.ensure_future(look_up("a.dead", 80))
        await until(lambda: names.asked)
        asking.cancel()

    ended = threading.Event()

    def run() -> None:
        asyncio.run(ask())
        ended.set()

    threading.Thread(target=run, daemon=True).start()
    await until(ended.is_set)
    (thread,) = names.asked
    assert thread.daemon


async def test_a_lookup_without_a_thread_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(OSError, match="a name cannot be looked up: can't start new thread"):
        await look_up("a name", 80)
