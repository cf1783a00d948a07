"""Commands at the router: the admin socket needs no key, TCP the admin key, and the clients' key
opens neither.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from yarl import URL

from pdlaunch.router import admin
from pdlaunch.router.admin import listen_at_admin_socket
from tests.router.conftest import SPEC, Stand, pairs
from tests.router.fake_engine import FakeEngine
from tests.router.test_life_of_a_request import completion

KEYS = msgspec.structs.replace(SPEC, api_key="of-the-clients", admin_api_key="of-the-admin")
COMMANDS = [
    ("POST", "/sleep"),
    ("POST", "/wake_up"),
    ("GET", "/is_sleeping"),
    ("GET", "/pdlaunch/integrity"),
    ("GET", "/pdlaunch/engines/decode-0/metrics"),
    ("POST", "/pdlaunch/engines/decode-0/v1/completions"),
]


class AdminStand:
    """A router with two pairs of engines, and a client at its admin socket."""

    def __init__(
        self, stand: Stand, engines: list[FakeEngine], session: aiohttp.ClientSession
    ) -> None:
        self.stand = stand
        self.engines = engines
        self.session = session
        self.commands: list[tuple[str, str, str]] = []
        for engine in engines:
            engine.commands = self.commands

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        async with self.session.request(method, path, **options) as response:
            return response.status, await response.json()


@pytest.fixture
async def admin_stand(stand: Stand, tmp_path: Path) -> AsyncIterator[AdminStand]:
    engines = pairs(2)
    await stand.start(engines, spec=KEYS)
    runner = await listen_at_admin_socket(stand.router.app, tmp_path / "admin.sock")
    async with aiohttp.ClientSession(
        "http://pdlaunch", connector=aiohttp.UnixConnector(str(tmp_path / "admin.sock"))
    ) as session:
        yield AdminStand(stand, engines, session)
    await runner.cleanup()


async def test_commands_find_a_socket_while_a_router_takes_the_place_of_another(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one, at which they wait, until the new one listens."""
    await stand.start(pairs(1))
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    found: list[tuple[int, bool]] = []
    start = web.SockSite.start

    async def look(site: web.SockSite) -> None:
        before = path.stat().st_ino
        await start(site)
        found.append((before, path.stat().st_ino == before))

    monkeypatch.setattr(web.SockSite, "start", look)
    old = path.stat().st_ino
    runner = await listen_at_admin_socket(stand.router.app, path)
    assert found == [(old, True)]
    assert path.stat().st_ino != old
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    await runner.cleanup()


async def test_no_row_of_the_table_opens_with_another_key(admin_stand: AdminStand) -> None:
    rows = admin.Admin(admin_stand.stand.state, admin_stand.stand.link).routes()
    assert {path.partition("?")[0] for _, path in COMMANDS[:4]} <= {row.path for row in rows}
    for row in rows:
        path = row.path.replace("{engine}", "decode-0").replace("{path:.*}", "metrics")
        for key in ("", "of-the-clients", "launch-token"):
            headers = {"Authorization": f"Bearer {key}"}
            method = "DELETE" if row.method == "*" else row.method
            async with admin_stand.stand.session.request(method, path, headers=headers) as response:
                assert response.status == 401, row.path
    assert not admin_stand.commands


async def test_prefill_sleeps_first_and_decode_wakes_first(admin_stand: AdminStand) -> None:
    status, answer = await admin_stand.call("POST", "/sleep?level=2&mode=refuse")
    assert status == 200
    assert [outcome["engine"] for outcome in answer["engines"]] == [
        "prefill-0",
        "prefill-1",
        "decode-0",
        "decode-1",
    ]
    assert {(outcome["is_sleeping"], outcome["num_bytes"]) for outcome in answer["engines"]} == {
        (True, 7)
    }
    bearer = "Bearer launch-token"
    assert admin_stand.commands == [
        (outcome["engine"], "/sleep?level=2&mode=refuse", bearer) for outcome in answer["engines"]
    ]
    assert (await admin_stand.call("GET", "/is_sleeping"))[1]["is_sleeping"] is True
    admin_stand.commands.clear()
    status, answer = await admin_stand.call(
        "POST", "/wake_up?tags=weights&tags=kv_cache&engine=prefill-1&engine=decode-0"
    )
    assert status == 200
    assert [name for name, *_ in admin_stand.commands] == ["decode-0", "prefill-1"]
    assert {path for _, path, _ in admin_stand.commands} == {"/wake_up?tags=weights&tags=kv_cache"}
    status, answer = await admin_stand.call("GET", "/is_sleeping")
    assert answer["is_sleeping"] is False
    assert {outcome["engine"]: outcome["is_sleeping"] for outcome in answer["engines"]}[
        "decode-1"
    ] is True


async def test_one_refusal_is_the_answer_and_the_others_are_told_too(
    admin_stand: AdminStand,
) -> None:
    admin_stand.engines[0].status = 409
    await admin_stand.engines[1].stop()
    status, answer = await admin_stand.call("POST", "/sleep")
    assert (status, answer["error"]["message"]) == (409, "made up")
    by_engine = {outcome["engine"]: outcome for outcome in answer["engines"]}
    assert by_engine["prefill-0"]["error"]["message"] == "made up"
    assert by_engine["prefill-1"]["error"]["code"] == "engine_failed"
    assert by_engine["decode-0"]["is_sleeping"] is True


@pytest.mark.parametrize(("method", "path"), COMMANDS)
async def test_an_unknown_engine_is_named(admin_stand: AdminStand, method: str, path: str) -> None:
    wrong = (
        path.replace("decode-0", "decode-7")
        if "decode-0" in path
        else f"{path}?engine=decode-0&engine=decode-7"
    )
    status, answer = await admin_stand.call(method, wrong)
    assert (status, answer["error"]["code"]) == (404, "engine_not_found")
    assert "decode-7" in answer["error"]["message"]
    assert "prefill-1" in answer["error"]["message"]
    assert not admin_stand.commands


async def test_one_engine_alone_answers_as_it_does(admin_stand: AdminStand) -> None:
    status, answer = await admin_stand.call(
        "POST", "/pdlaunch/engines/decode-1/v1/completions", json=completion()
    )
    assert status == 200
    assert answer["choices"]
    (seen,) = admin_stand.engines[3].seen
    assert seen.headers["Authorization"] == "Bearer launch-token"
    status, answer = await admin_stand.call(
        "POST", "/pdlaunch/engines/decode-1/v1/completions", json=completion(temperature=-1)
    )
    assert (status, answer["error"]["param"]) == (400, "temperature")
    async with admin_stand.session.get("/pdlaunch/engines/decode-1/metrics?x=%2F%26") as response:
        assert response.content_type == "text/plain"
        assert "pdlaunch_" in await response.text()
    for method, path, expected in (("HEAD", "v1/models", 200), ("GET", "no%20such%3Fpath", 404)):
        url = URL(f"/pdlaunch/engines/decode-1/{path}", encoded=True)
        async with admin_stand.session.request(method, url) as response:
            assert response.status == expected


async def test_connections_of_strangers_lock_nobody_out(stand: Stand, tmp_path: Path) -> None:
    """Those of the public address are all busy."""
    engines = pairs(1)
    engines[1].hold_after = 0
    await stand.start(engines, spec=msgspec.structs.replace(SPEC, max_connections=1))
    runner = await listen_at_admin_socket(stand.router.app, tmp_path / "admin.sock")
    running = asyncio.create_task(stand.post(completion()))
    await engines[1].holding.wait()
    async with aiohttp.ClientSession() as stranger, stranger.get(f"{stand.url}/health") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (
            503,
            "too_many_connections",
        )
    async with (
        aiohttp.ClientSession(
            "http://launch", connector=aiohttp.UnixConnector(str(tmp_path / "admin.sock"))
        ) as session,
        session.get("/is_sleeping") as response,
    ):
        assert response.status == 200
    engines[1].go.set()
    assert (await running).status == 200
    await runner.cleanup()
