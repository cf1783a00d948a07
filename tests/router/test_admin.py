"""Commands at the router: the admin socket needs no key, TCP the admin key, and the clients' key
opens neither.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from yarl import URL

from pdlaunch.protocol.control import (
    Answered,
    Command,
    PlannedChange,
    PlannedEngine,
    RefusalCode,
    Registry,
)
from pdlaunch.router import admin
from pdlaunch.router.admin import listen_at_admin_socket
from tests.router.conftest import Stand, client_key, named, pairs, working
from tests.router.fake_engine import until
from tests.router.test_life_of_a_request import completion, expected_text

KEYS = {"keys": (client_key("of-the-clients"),), "admin_api_key": "of-the-admin"}
COMMANDS = [
    ("POST", "/sleep"),
    ("POST", "/wake_up"),
    ("GET", "/is_sleeping"),
    ("GET", "/pdlaunch/integrity"),
    ("GET", "/pdlaunch/engines/decode-0/metrics"),
    ("POST", "/pdlaunch/engines/decode-0/v1/completions"),
]


class AdminStand(Stand):
    """A router with two pairs of engines, and a client at its admin socket."""

    unix: aiohttp.ClientSession

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[tuple[str, str, str]] = []

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        async with self.unix.request(method, path, **options) as response:
            return response.status, await response.json()

    def command(self, name: str, **body: Any) -> asyncio.Task[tuple[int, Any]]:
        return asyncio.create_task(self.call("POST", f"/pdlaunch/{name}", json=body))

    async def wanted(self, number: int = 1) -> Any:
        """The last command that the supervisor got, once there are so many."""
        await until(lambda: len(self.asked) == number)
        return self.asked[-1]

    def answer(self, command: Command, **fields: Any) -> None:
        self.link.answered(Answered(question=command.question, **fields))


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[AdminStand]:
    stand = AdminStand()
    engines = pairs(2)
    for engine in engines:
        engine.commands = stand.commands
    await stand.start(engines, max_connections=1, **KEYS)
    runner = await listen_at_admin_socket(stand.router.app, tmp_path / "admin.sock")
    connector = aiohttp.UnixConnector(str(tmp_path / "admin.sock"))
    async with aiohttp.ClientSession("http://pdlaunch", connector=connector) as stand.unix:
        yield stand
    await runner.cleanup()
    await stand.close()


async def test_no_row_of_the_table_opens_with_another_key(stand: AdminStand) -> None:
    rows = admin.Admin(stand.state, stand.link).routes()
    assert {path.partition("?")[0] for _, path in COMMANDS[:4]} <= {row.path for row in rows}
    for row in rows:
        path = row.path.replace("{engine}", "decode-0").replace("{path:.*}", "metrics")
        for key in ("", "of-the-clients", "launch-token"):
            headers = {"Authorization": f"Bearer {key}"}
            method = "DELETE" if row.method == "*" else row.method
            async with stand.session.request(method, path, headers=headers) as response:
                assert response.status == 401, row.path
    assert not stand.commands


async def test_prefill_sleeps_first_and_decode_wakes_first(stand: AdminStand) -> None:
    names = ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    status, answer = await stand.call("POST", "/sleep?level=2&mode=refuse")
    asleep = {"is_sleeping": True, "num_bytes": 7}
    assert status == 200
    assert [each["engine"] for each in answer["engines"]] == names
    assert all(asleep.items() <= each.items() for each in answer["engines"])
    path = "/sleep?level=2&mode=refuse"
    assert stand.commands == [(name, path, "Bearer launch-token") for name in names]
    assert (await stand.call("GET", "/is_sleeping"))[1]["is_sleeping"] is True
    stand.commands.clear()
    path = "/wake_up?tags=weights&tags=kv_cache"
    await stand.call("POST", f"{path}&engine=prefill-1&engine=decode-0")
    assert [each[:2] for each in stand.commands] == [("decode-0", path), ("prefill-1", path)]
    status, answer = await stand.call("GET", "/is_sleeping")
    assert (status, answer["is_sleeping"]) == (200, False)
    asleep_now = {each["engine"] for each in answer["engines"] if each["is_sleeping"]}
    assert asleep_now == {"decode-1", "prefill-0"}


async def test_one_refusal_is_the_answer_and_the_others_are_told_too(stand: AdminStand) -> None:
    stand.engines["prefill-0"].status = 409
    await stand.engines["prefill-1"].stop()
    status, answer = await stand.call("POST", "/sleep")
    assert (status, answer["error"]["message"]) == (409, "made up")
    by_engine = {outcome["engine"]: outcome for outcome in answer["engines"]}
    assert by_engine["prefill-0"]["error"]["message"] == "made up"
    assert by_engine["prefill-1"]["error"]["code"] == "engine_failed"
    assert by_engine["decode-0"]["is_sleeping"] is True


@pytest.mark.parametrize(("method", "path"), COMMANDS)
async def test_an_unknown_engine_is_named(stand: AdminStand, method: str, path: str) -> None:
    if "decode-0" not in path:
        path += "?engine=prefill-0&engine=decode-0"
    status, answer = await stand.call(method, path.replace("decode-0", "decode-7"))
    assert (status, answer["error"]["code"]) == (404, "engine_not_found")
    assert "decode-7" in answer["error"]["message"]
    assert "prefill-1" in answer["error"]["message"]
    assert not stand.commands


async def test_one_engine_alone_answers_as_it_does(stand: AdminStand) -> None:
    path = "/pdlaunch/engines/decode-1/v1/completions"
    status, answer = await stand.call("POST", path, json=completion())
    assert (status, bool(answer["choices"])) == (200, True)
    (seen,) = stand.engines["decode-1"].seen
    assert seen.headers["Authorization"] == "Bearer launch-token"
    status, answer = await stand.call("POST", path, json=completion(temperature=-1))
    assert (status, answer["error"]["param"]) == (400, "temperature")
    async with stand.unix.get("/pdlaunch/engines/decode-1/metrics?x=%2F%26") as response:
        assert response.content_type == "text/plain"
        assert "pdlaunch_" in await response.text()
    for method, path, expected in (("HEAD", "v1/models", 200), ("GET", "no%20such%3Fpath", 404)):
        url = URL(f"/pdlaunch/engines/decode-1/{path}", encoded=True)
        async with stand.unix.request(method, url) as response:
            assert response.status == expected


CLIENT = {"Authorization": "Bearer of-the-clients"}


async def test_connections_of_strangers_lock_nobody_out(stand: AdminStand) -> None:
    """Those of the public address are all busy."""
    prefill = stand.engines["prefill-0"]
    await set_drained(stand, "drain", "prefill-1")
    prefill.hold_prefill = True
    running = asyncio.create_task(stand.post(completion(), headers=CLIENT))
    await prefill.holding.wait()
    async with aiohttp.ClientSession() as stranger, stranger.get(f"{stand.url}/health") as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "too_many_connections"
    assert (await stand.call("GET", "/is_sleeping"))[0] == 200
    prefill.go.set()
    assert (await running).status == 200


NEW = {"name": "prefill-1", "role": "prefill", "host": "local", "devices": ["cpu"]}
PLAN = PlannedChange(
    replicas={"prefill": 2, "decode": 1, "both": 0},
    starts=[PlannedEngine(**NEW, num_threads=3)],
    stops={"decode-1": 0},
    stops_first=False,
    drain_s=30.0,
)
SHOWN = msgspec.to_builtins(PLAN)


async def test_a_scale_is_answered_when_it_is_done(stand: AdminStand) -> None:
    replicas = {"prefill": 2, "decode": 1}
    scaled = stand.command("scale", replicas=replicas, drain_timeout_s=12)
    wanted = await stand.wanted()
    assert (wanted.replicas, wanted.drain_timeout_s) == (replicas, 12.0)
    stand.answer(wanted, change=PLAN, notes=["PD412"], is_done=False)
    await asyncio.sleep(0)
    assert not scaled.done()
    stand.answer(wanted)
    change = SHOWN | {"stops": {"decode-1": 0}}
    assert await scaled == (200, {"dry_run": False, "notes": ["PD412"], "change": change})


async def test_a_dry_run_says_what_runs_at_engines_that_would_stop(stand: AdminStand) -> None:
    with working(named(stand, "decode-1")):
        dry = stand.command("role", engine="decode-1", role="prefill", dry_run=True)
        wanted = await stand.wanted()
        assert (wanted.engine, wanted.role, wanted.dry_run) == ("decode-1", "prefill", True)
        stand.answer(wanted, change=PLAN)
        status, body = await dry
    assert (status, body["dry_run"], body["change"]["stops"]) == (200, True, {"decode-1": 1})


@pytest.mark.parametrize(
    ("command", "body"),
    [
        ("scale", {}),
        ("scale", {"replicas": {"decode": 1.5}}),
        ("scale", {"replicas": {"decode": 9999}}),
        ("scale", {"replicas": {"deocde": 1}}),
        ("scale", {"decode": 1}),
        ("scale", {"replicas": {"decode": 1}, "drain_timeout_s": -1}),
        ("role", {"engine": "decode-0"}),
        ("role", {"engine": "decode-0", "role": "router"}),
        ("drain", {}),
        ("drain?engine=decode-0&timeout_s=soon", {}),
    ],
)
async def test_a_wrong_call_is_refused(
    stand: AdminStand, command: str, body: dict[str, Any]
) -> None:
    status, answered = await stand.command(command, **body)
    codes = ("missing_engine", "invalid_timeout", "invalid_change")
    assert (status, answered["error"]["code"] in codes) == (400, True)
    assert not stand.asked


async def set_drained(stand: AdminStand, verb: str, *names: str, timeout_s: float = 60.0) -> Any:
    """Send a command, do as the supervisor does, and return the answer."""
    query = "&".join(f"engine={name}" for name in names)
    done = stand.command(f"{verb}?{query}&timeout_s={timeout_s}")
    first = len(stand.asked)
    for number, name in enumerate(names, start=1):
        command = await stand.wanted(first + number)
        is_drained = verb == "drain"
        assert (command.name, command.is_drained) == (name, is_drained)
        stand.engines[name].withheld = "draining" if is_drained else ""
        stand.publish()
        stand.answer(command, engine=name, notes=["a note"])
    return await done


async def test_a_drained_engine_gets_no_request_until_it_is_undrained(stand: AdminStand) -> None:
    names, told = ("decode-0", "prefill-1"), {"is_drained": True, "notes": ["a note"], "running": 0}
    drained = await set_drained(stand, "drain", *names)
    assert drained == (200, {"engines": [{"engine": name} | told for name in names]})
    for _ in range(4):
        assert (await stand.post(completion(), headers=CLIENT)).status == 200
    assert not stand.engines["decode-0"].seen
    assert not stand.engines["prefill-1"].seen
    _, status = await stand.call("GET", "/pdlaunch/status")
    states = {each["name"]: (each["state"], each["is_down"]) for each in status["engines"]}
    assert (states["decode-0"], states["decode-1"]) == (("draining", False), ("ready", False))
    assert (await set_drained(stand, "undrain", "decode-0"))[0] == 200
    for _ in range(4):
        assert (await stand.post(completion(), headers=CLIENT)).status == 200
    assert stand.engines["decode-0"].seen


async def test_a_drain_waits_for_streams_and_for_blocks_that_are_yet_to_be_read(
    stand: AdminStand,
) -> None:
    prefill = named(stand, "prefill-0")
    await set_drained(stand, "drain", "decode-1")
    decode = stand.engines["decode-0"]
    decode.hold_after = 2
    stream = asyncio.create_task(stand.post(completion(stream=True), headers=CLIENT))
    await decode.holding.wait()
    await until(lambda: not prefill.num_leases)
    prefill.num_leases = 2
    for name, running in (("decode-0", 1), ("prefill-0", 2)):
        _, body = await set_drained(stand, "drain", name, timeout_s=0)
        assert body["engines"][0]["running"] == running
    waits = asyncio.create_task(set_drained(stand, "drain", "decode-0", "prefill-0"))
    await stand.wanted(5)
    decode.go.set()
    assert (await stream).texts() == {0: expected_text("hello", 6)}
    assert not waits.done()
    prefill.num_leases = 0
    assert [each["running"] for each in (await waits)[1]["engines"]] == [0, 0]


@pytest.mark.parametrize("is_drained", [False, True])
async def test_a_restart_is_answered_when_the_engine_serves_or_stands_by_again(
    stand: AdminStand, is_drained: bool
) -> None:
    decode = stand.engines["decode-0"]
    decode.withheld = "draining" if is_drained else ""
    stand.publish()
    restarted = stand.command("restart?engine=decode-0/rank-0")
    stand.answer(await stand.wanted(), engine="decode-0", incarnation=1)
    stand.publish()
    stand.publish({"decode-0": None})
    decode.incarnation = 2
    stand.publish({"decode-0": "starting"})
    await asyncio.sleep(0)
    assert not restarted.done()
    stand.publish()
    assert await restarted == (200, {"engines": [{"engine": "decode-0", "incarnation": 2}]})
    assert named(stand, "decode-0").ready != is_drained


async def test_an_engine_that_is_given_up_again_is_an_error(stand: AdminStand) -> None:
    restarted = stand.command("restart?engine=decode-0")
    stand.answer(await stand.wanted(), engine="decode-0", incarnation=1)
    (server, _) = stand.engines["decode-0"].entries("failed")
    server.incarnation, server.reason = 6, "died 5 times: disk full"
    stand.state.update(Registry(version=99, entries=[server]))
    status, body = await restarted
    message = "decode-0 has failed: died 5 times: disk full"
    assert (status, body["error"]["message"]) == (503, message)


@pytest.mark.parametrize(("code", "status"), [("engine_not_found", 404), ("not_now", 409)])
async def test_a_refusal_of_the_supervisor_is_passed_on(
    stand: AdminStand, code: RefusalCode, status: int
) -> None:
    restarted = stand.command("restart?engine=decode-7")
    stand.answer(await stand.wanted(), code=code, error="no, because")
    assert (await restarted)[0] == status
    assert (await restarted)[1]["error"]["message"] == "no, because"
