"""Commands at the router: the admin socket needs no key, TCP the admin key, and the clients' key
opens neither.
"""

from __future__ import annotations

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
    ChangeEngines,
    Command,
    PlannedChange,
    PlannedEngine,
    RefusalCode,
    Registry,
    SetDrained,
)
from pdlaunch.router import admin
from pdlaunch.router.admin import listen_at_admin_socket
from tests.router.conftest import SPEC, Stand, client_key, named, pairs, working
from tests.router.fake_engine import FakeEngine, until
from tests.router.test_life_of_a_request import completion, expected_text

KEYS = msgspec.structs.replace(
    SPEC,
    keys=(client_key("of-the-clients"),),
    admin_api_key="of-the-admin",
    max_connections=1,
)
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


CLIENT = {"Authorization": "Bearer of-the-clients"}


async def test_connections_of_strangers_lock_nobody_out(admin_stand: AdminStand) -> None:
    """Those of the public address are all busy."""
    stand, prefill = admin_stand.stand, admin_stand.engines[0]
    await set_drained(admin_stand, "drain", "prefill-1")
    prefill.hold_prefill = True
    running = asyncio.create_task(stand.post(completion(), headers=CLIENT))
    await prefill.holding.wait()
    async with aiohttp.ClientSession() as stranger, stranger.get(f"{stand.url}/health") as response:
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "too_many_connections"
    assert (await admin_stand.call("GET", "/is_sleeping"))[0] == 200
    prefill.go.set()
    assert (await running).status == 200


Call = asyncio.Task[tuple[int, Any]]


def call(stand: AdminStand, command: str, **body: Any) -> Call:
    return asyncio.create_task(stand.call("POST", f"/pdlaunch/{command}", json=body))


async def asked(stand: AdminStand, number: int = 1) -> Command:
    await until(lambda: len(stand.stand.asked) == number)
    return stand.stand.asked[-1]


def answer(stand: AdminStand, command: Command, **fields: Any) -> None:
    stand.stand.link.answered(Answered(question=command.question, **fields))


PLAN = PlannedChange(
    replicas={"prefill": 2, "decode": 1, "both": 0},
    starts=[
        PlannedEngine(
            name="prefill-1", role="prefill", host="local", devices=["cpu"], num_threads=3
        )
    ],
    stops={"decode-1": 0},
    stops_first=False,
    drain_s=30.0,
)
SHOWN = msgspec.to_builtins(PLAN)


async def test_a_scale_is_answered_when_it_is_done(admin_stand: AdminStand) -> None:
    replicas: dict[Any, int] = {"prefill": 2, "decode": 1}
    scaled = call(admin_stand, "scale", replicas=replicas, drain_timeout_s=12)
    wanted = await asked(admin_stand)
    assert wanted == ChangeEngines(
        question=wanted.question,
        expires_at=wanted.expires_at,
        replicas=replicas,
        drain_timeout_s=12.0,
    )
    answer(admin_stand, wanted, change=PLAN, notes=["PD412"], is_done=False)
    await asyncio.sleep(0)
    assert not scaled.done()
    answer(admin_stand, wanted)
    change = SHOWN | {"stops": {"decode-1": 0}}
    assert await scaled == (200, {"dry_run": False, "notes": ["PD412"], "change": change})


async def test_a_dry_run_says_what_runs_at_engines_that_would_stop(admin_stand: AdminStand) -> None:
    with working(named(admin_stand.stand, "decode-1")):
        dry = call(admin_stand, "role", engine="decode-1", role="prefill", dry_run=True)
        wanted = await asked(admin_stand)
        assert isinstance(wanted, ChangeEngines)
        assert (wanted.engine, wanted.role, wanted.dry_run) == ("decode-1", "prefill", True)
        answer(admin_stand, wanted, change=PLAN)
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
    admin_stand: AdminStand, command: str, body: dict[str, Any]
) -> None:
    status, answered = await call(admin_stand, command, **body)
    codes = ("missing_engine", "invalid_timeout", "invalid_change")
    assert (status, answered["error"]["code"] in codes) == (400, True)
    assert not admin_stand.stand.asked


async def set_drained(stand: AdminStand, verb: str, *names: str, timeout_s: float = 60.0) -> Any:
    """Send a command, do as the supervisor does, and return the answer."""
    query = "&".join(f"engine={name}" for name in names)
    done = call(stand, f"{verb}?{query}&timeout_s={timeout_s}")
    first = len(stand.stand.asked)
    for number, name in enumerate(names, start=1):
        command = await asked(stand, first + number)
        is_drained = verb == "drain"
        assert command == SetDrained(
            question=command.question,
            expires_at=command.expires_at,
            name=name,
            is_drained=is_drained,
        )
        stand.stand.engines[name].withheld = "draining" if is_drained else ""
        stand.stand.publish()
        answer(stand, command, engine=name, notes=["a note"])
    return await done


async def test_a_drained_engine_gets_no_request_until_it_is_undrained(
    admin_stand: AdminStand,
) -> None:
    stand = admin_stand.stand
    drained = {"is_drained": True, "notes": ["a note"], "running": 0}
    outcomes = [{"engine": name} | drained for name in ("decode-0", "prefill-1")]
    assert await set_drained(admin_stand, "drain", "decode-0", "prefill-1") == (
        200,
        {"engines": outcomes},
    )
    for _ in range(4):
        assert (await stand.post(completion(), headers=CLIENT)).status == 200
    assert not stand.engines["decode-0"].seen
    assert not stand.engines["prefill-1"].seen
    _, status = await admin_stand.call("GET", "/pdlaunch/status")
    states = {engine["name"]: engine["state"] for engine in status["engines"]}
    assert (states["decode-0"], states["decode-1"]) == ("draining", "ready")
    assert not any(engine["is_down"] for engine in status["engines"])
    assert (await set_drained(admin_stand, "undrain", "decode-0"))[0] == 200
    for _ in range(4):
        assert (await stand.post(completion(), headers=CLIENT)).status == 200
    assert stand.engines["decode-0"].seen


async def test_a_drain_waits_for_streams_and_for_blocks_that_are_yet_to_be_read(
    admin_stand: AdminStand,
) -> None:
    stand, prefill = admin_stand.stand, named(admin_stand.stand, "prefill-0")
    await set_drained(admin_stand, "drain", "decode-1")
    decode = stand.engines["decode-0"]
    decode.hold_after = 2
    stream = asyncio.create_task(stand.post(completion(stream=True), headers=CLIENT))
    await decode.holding.wait()
    await until(lambda: not prefill.num_leases)
    prefill.num_leases = 2
    for name, running in (("decode-0", 1), ("prefill-0", 2)):
        _, body = await set_drained(admin_stand, "drain", name, timeout_s=0)
        assert body["engines"][0]["running"] == running
    waits = asyncio.create_task(set_drained(admin_stand, "drain", "decode-0", "prefill-0"))
    await asked(admin_stand, 5)
    decode.go.set()
    assert (await stream).texts() == {0: expected_text("hello", 6)}
    assert not waits.done()
    prefill.num_leases = 0
    assert [each["running"] for each in (await waits)[1]["engines"]] == [0, 0]


def restart(stand: AdminStand, name: str) -> Call:
    return call(stand, f"restart?engine={name}")


@pytest.mark.parametrize("is_drained", [False, True])
async def test_a_restart_is_answered_when_the_engine_serves_or_stands_by_again(
    admin_stand: AdminStand, is_drained: bool
) -> None:
    stand, decode = admin_stand.stand, admin_stand.stand.engines["decode-0"]
    decode.withheld = "draining" if is_drained else ""
    stand.publish()
    restarted = restart(admin_stand, "decode-0/rank-0")
    answer(admin_stand, await asked(admin_stand), engine="decode-0", incarnation=1)
    stand.publish()
    stand.publish(without=["decode-0"])
    decode.incarnation = 2
    stand.publish(starting=["decode-0"])
    await asyncio.sleep(0)
    assert not restarted.done()
    stand.publish()
    assert await restarted == (200, {"engines": [{"engine": "decode-0", "incarnation": 2}]})
    assert named(stand, "decode-0").ready != is_drained


async def test_an_engine_that_is_given_up_again_is_an_error(admin_stand: AdminStand) -> None:
    stand = admin_stand.stand
    restarted = restart(admin_stand, "decode-0")
    answer(admin_stand, await asked(admin_stand), engine="decode-0", incarnation=1)
    (server, _) = stand.engines["decode-0"].entries()
    server.incarnation, server.state, server.reason = 6, "failed", "died 5 times: disk full"
    stand.state.update(Registry(version=99, entries=[server]))
    status, body = await restarted
    message = "decode-0 has failed: died 5 times: disk full"
    assert (status, body["error"]["message"]) == (503, message)


@pytest.mark.parametrize(("code", "status"), [("engine_not_found", 404), ("not_now", 409)])
async def test_a_refusal_of_the_supervisor_is_passed_on(
    admin_stand: AdminStand, code: RefusalCode, status: int
) -> None:
    restarted = restart(admin_stand, "decode-7")
    answer(admin_stand, await asked(admin_stand), code=code, error="no, because")
    assert (await restarted)[0] == status
    assert (await restarted)[1]["error"]["message"] == "no, because"
