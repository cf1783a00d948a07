"""``POST /pdlaunch/scale`` and ``role`` at the router; the supervisor is the test."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pdlaunch.protocol.control import Answered, ChangeEngines, PlannedChange, PlannedEngine
from tests.router.conftest import working
from tests.router.fake_engine import until
from tests.router.test_admin import AdminStand, admin_stand

__all__ = ["admin_stand"]

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
SHOWN = {
    "replicas": {"prefill": 2, "decode": 1, "both": 0},
    "starts": [
        {
            "name": "prefill-1",
            "role": "prefill",
            "host": "local",
            "devices": ["cpu"],
            "num_threads": 3,
        }
    ],
    "stops": {"decode-1": 0},
    "stops_first": False,
    "drain_s": 30.0,
}


def call(stand: AdminStand, command: str, **body: Any) -> asyncio.Task[tuple[int, Any]]:
    return asyncio.create_task(stand.call("POST", f"/pdlaunch/{command}", json=body))


async def asked(stand: AdminStand) -> ChangeEngines:
    await until(lambda: stand.stand.asked)
    wanted = stand.stand.asked[-1]
    assert isinstance(wanted, ChangeEngines)
    return wanted


async def test_it_is_answered_when_the_change_is_done(admin_stand: AdminStand) -> None:
    answer = call(admin_stand, "scale", prefill=2, decode=1, drain_timeout_s=12)
    wanted = await asked(admin_stand)
    assert wanted == ChangeEngines(
        question=wanted.question, replicas={"prefill": 2, "decode": 1}, drain_s=12.0
    )
    link = admin_stand.stand.link
    link.answered(Answered(question=wanted.question, change=PLAN, notes=["PD412"], is_done=False))
    await asyncio.sleep(0)
    assert not answer.done()
    link.answered(Answered(question=wanted.question))
    assert await answer == (200, {"dry_run": False, "notes": ["PD412"], "change": SHOWN})


async def test_a_dry_run_says_what_runs_at_engines_that_would_stop(
    admin_stand: AdminStand,
) -> None:
    stand = admin_stand.stand
    (decode,) = [engine for engine in stand.pool.engines if engine.name == "decode-1"]
    with working(decode):
        answer = call(admin_stand, "scale", decode=1, dry_run=True)
        wanted = await asked(admin_stand)
        assert wanted.dry_run
        stand.link.answered(Answered(question=wanted.question, change=PLAN))
        status, body = await answer
    assert (status, body["dry_run"], body["change"]["stops"]) == (200, True, {"decode-1": 1})


async def test_a_refusal_is_passed_on(admin_stand: AdminStand) -> None:
    answer = call(admin_stand, "scale", decode=0)
    wanted = await asked(admin_stand)
    admin_stand.stand.link.answered(
        Answered(question=wanted.question, error="PD102 decode.replicas: no decode engine")
    )
    status, body = await answer
    assert (status, body["error"]["code"], "change" in body) == (409, "refused", False)


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
    ],
)
async def test_a_wrong_call_is_refused(
    admin_stand: AdminStand, command: str, body: dict[str, Any]
) -> None:
    status, answer = await call(admin_stand, command, **body)
    assert (status, answer["error"]["code"]) == (400, "invalid_change")
    assert not admin_stand.stand.asked
