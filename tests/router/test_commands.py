"""Commands that only the supervisor can do, at the router; the supervisor is the test."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from pdlaunch.protocol.control import (
    Answered,
    ChangeEngines,
    Command,
    PlannedChange,
    PlannedEngine,
    Registry,
    SetDrained,
)
from tests.router.conftest import named, working
from tests.router.fake_engine import until
from tests.router.test_admin import AdminStand, admin_stand
from tests.router.test_life_of_a_request import completion, expected_text

__all__ = ["admin_stand"]

CLIENT = {"Authorization": "Bearer of-the-clients"}
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
    stops=["decode-1"],
    stops_first=False,
    drain_s=30.0,
)
SHOWN = msgspec.to_builtins(PLAN)


async def test_a_scale_is_answered_when_it_is_done(admin_stand: AdminStand) -> None:
    scaled = call(admin_stand, "scale", prefill=2, decode=1, drain_timeout_s=12)
    wanted = await asked(admin_stand)
    replicas = {"prefill": 2, "decode": 1}
    assert wanted == ChangeEngines(
        question=wanted.question, expires_at=wanted.expires_at, replicas=replicas, drain_s=12.0
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
        assert (wanted.turn, wanted.role, wanted.dry_run) == ("decode-1", "prefill", True)
        answer(admin_stand, wanted, change=PLAN)
        status, body = await dry
    assert (status, body["dry_run"], body["change"]["stops"]) == (200, True, {"decode-1": 1})


@pytest.mark.parametrize(
    ("command", "body"),
    [
        ("scale", {}),
        ("scale", {"decode": -1}),
        ("scale", {"decode": 1.5}),
        ("scale", {"deocde": 1}),
        ("scale", {"decode": 1, "drain_timeout_s": -1}),
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
        answer(stand, command, engine=name, notes=["a note"])
        stand.stand.engines[name].withheld = "draining" if is_drained else ""
        stand.stand.publish()
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
    message = "decode-0 is given up again: died 5 times: disk full"
    assert (status, body["error"]["message"]) == (503, message)


@pytest.mark.parametrize(("engine", "status"), [("", 404), ("decode-0", 409)])
async def test_a_refusal_of_the_supervisor_is_passed_on(
    admin_stand: AdminStand, engine: str, status: int
) -> None:
    restarted = restart(admin_stand, "decode-7")
    answer(admin_stand, await asked(admin_stand), engine=engine, error="no, because")
    assert (await restarted)[0] == status
    assert (await restarted)[1]["error"]["message"] == "no, because"
