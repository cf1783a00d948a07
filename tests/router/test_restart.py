"""``POST /pdlaunch/restart`` at the router; the supervisor is the test."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pdlaunch.protocol.control import Answered, Registry
from pdlaunch.router import admin
from tests.router.conftest import Stand
from tests.router.fake_engine import until
from tests.router.test_admin import AdminStand, admin_stand

__all__ = ["admin_stand"]


def restart(stand: AdminStand, *names: str) -> asyncio.Task[tuple[int, Any]]:
    query = "&".join(f"engine={name}" for name in names)
    return asyncio.create_task(stand.call("POST", f"/pdlaunch/restart?{query}"))


async def asked(stand: Stand, number: int = 1) -> int:
    """The question that is to be answered."""
    await until(lambda: len(stand.asked) == number)
    return stand.asked[-1].question


async def test_it_is_answered_when_the_new_engine_serves(admin_stand: AdminStand) -> None:
    stand, decode = admin_stand.stand, admin_stand.stand.engines["decode-0"]
    answer = restart(admin_stand, "decode-0/rank-0")
    question = await asked(stand)
    assert stand.asked[0].name == "decode-0/rank-0"
    stand.link.answered(Answered(question=question, engine="decode-0", incarnation=1))
    stand.publish()
    stand.publish(without=["decode-0"])
    decode.incarnation = 2
    stand.publish(starting=["decode-0"])
    await asyncio.sleep(0)
    assert not answer.done()
    stand.publish()
    assert await answer == (200, {"engines": [{"engine": "decode-0", "incarnation": 2}]})


async def test_one_that_is_drained_is_back_when_it_stands_by(admin_stand: AdminStand) -> None:
    stand, decode = admin_stand.stand, admin_stand.stand.engines["decode-0"]
    decode.withheld = "draining"
    stand.publish()
    answer = restart(admin_stand, "decode-0")
    question = await asked(stand)
    stand.link.answered(Answered(question=question, engine="decode-0", incarnation=1))
    decode.incarnation = 2
    stand.publish(starting=["decode-0"])
    await asyncio.sleep(0)
    assert not answer.done()
    stand.publish()
    assert (await answer)[0] == 200
    assert not stand.pool.lists(stand.pool.engines[0])


async def test_one_that_is_given_up_again_is_an_error(admin_stand: AdminStand) -> None:
    stand = admin_stand.stand
    answer = restart(admin_stand, "decode-0")
    stand.link.answered(Answered(question=await asked(stand), engine="decode-0", incarnation=1))
    (server, _) = stand.engines["decode-0"].entries()
    server.incarnation, server.state, server.reason = 6, "failed", "died 5 times: disk full"
    stand.state.update(Registry(version=99, entries=[server]))
    status, body = await answer
    assert (status, body["error"]["message"]) == (
        503,
        "decode-0 is given up again: died 5 times: disk full",
    )
    (engine,) = (await admin_stand.call("GET", "/pdlaunch/status"))[1]["engines"]
    assert (engine["state"], engine["reason"]) == ("failed", "died 5 times: disk full")


@pytest.mark.parametrize(("engine", "status"), [("", 404), ("decode-0", 409)])
async def test_a_refusal_of_the_supervisor_is_passed_on(
    admin_stand: AdminStand, engine: str, status: int
) -> None:
    answer = restart(admin_stand, "decode-7")
    question = await asked(admin_stand.stand)
    admin_stand.stand.link.answered(Answered(question=question, engine=engine, error="no, because"))
    assert (await answer)[0] == status
    assert (await answer)[1]["error"]["message"] == "no, because"


async def test_an_engine_that_does_not_come_back_is_503(
    admin_stand: AdminStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "RESTART_TIMEOUT_S", 0.01)
    answer = restart(admin_stand, "decode-0")
    admin_stand.stand.link.answered(
        Answered(question=await asked(admin_stand.stand), engine="decode-0", incarnation=1)
    )
    assert (await answer)[1]["error"]["code"] == "not_ready"
