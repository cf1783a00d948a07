"""``POST /pdlaunch/drain`` and ``undrain`` at the router; the supervisor is the test."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pdlaunch.protocol.control import Answered, SetDrained
from tests.router.fake_engine import until
from tests.router.test_admin import AdminStand, admin_stand
from tests.router.test_life_of_a_request import completion, expected_text

__all__ = ["admin_stand"]

CLIENT = {"Authorization": "Bearer of-the-clients"}


async def command(stand: AdminStand, verb: str, *names: str, timeout_s: float = 60.0) -> Any:
    """Send a command, do as the supervisor does, and return the answer."""
    query = "&".join(f"engine={name}" for name in names)
    call = asyncio.create_task(
        stand.call("POST", f"/pdlaunch/{verb}?{query}&timeout_s={timeout_s}")
    )
    router, first = stand.stand, len(stand.stand.asked)
    for number, name in enumerate(names, start=1):
        await until(lambda number=number: len(router.asked) == first + number or call.done())
        asked = router.asked[-1]
        assert asked == SetDrained(question=asked.question, name=name, is_drained=verb == "drain")
        router.link.answered(Answered(question=asked.question, engine=name, notes=["a note"]))
        router.engines[name].withheld = "draining" if verb == "drain" else ""
        router.publish()
    return await call


async def test_a_drained_engine_gets_no_request_until_it_is_undrained(
    admin_stand: AdminStand,
) -> None:
    stand = admin_stand.stand
    assert await command(admin_stand, "drain", "decode-0", "prefill-1") == (
        200,
        {
            "engines": [
                {"engine": name, "is_drained": True, "notes": ["a note"], "running": 0}
                for name in ("decode-0", "prefill-1")
            ]
        },
    )
    for _ in range(4):
        assert (await stand.post(completion(), headers=CLIENT)).status == 200
    assert not stand.engines["decode-0"].seen
    assert not stand.engines["prefill-1"].seen
    _, status = await admin_stand.call("GET", "/pdlaunch/status")
    states = {engine["name"]: engine["state"] for engine in status["engines"]}
    assert (states["decode-0"], states["decode-1"]) == ("draining", "ready")
    assert not any(engine["is_down"] for engine in status["engines"])
    await (await stand.session.get("/metrics")).read()
    assert stand.metric('pdlaunch_router_engines{state="draining"') == 2
    assert (await command(admin_stand, "undrain", "decode-0"))[0] == 200
    for _ in range(4):
        assert (await stand.post(completion(), headers=CLIENT)).status == 200
    assert stand.engines["decode-0"].seen


async def test_streams_go_on_at_a_drained_engine_which_is_waited_for(
    admin_stand: AdminStand,
) -> None:
    stand = admin_stand.stand
    await command(admin_stand, "drain", "decode-1")
    engine = stand.engines["decode-0"]
    engine.hold_after = 2
    stream = asyncio.create_task(stand.post(completion(stream=True), headers=CLIENT))
    await engine.holding.wait()
    await command(admin_stand, "undrain", "decode-1")
    status, body = await command(admin_stand, "drain", "decode-0", timeout_s=0)
    assert (status, body["engines"][0]["running"]) == (200, 1)
    waits = asyncio.create_task(command(admin_stand, "drain", "decode-0"))
    await until(lambda: len(stand.asked) == 4)
    assert not waits.done()
    engine.go.set()
    assert (await waits)[1]["engines"][0]["running"] == 0
    assert (await stream).texts() == {0: expected_text("hello", 6)}


async def test_prompts_whose_blocks_are_yet_to_be_read_are_waited_for(
    admin_stand: AdminStand,
) -> None:
    prefill = next(each for each in admin_stand.stand.pool.engines if each.name == "prefill-0")
    prefill.num_leases = 2
    _, body = await command(admin_stand, "drain", "prefill-0", timeout_s=0)
    assert body["engines"][0]["running"] == 2
    waits = asyncio.create_task(command(admin_stand, "drain", "prefill-0"))
    await until(lambda: len(admin_stand.stand.asked) == 2)
    prefill.num_leases = 0
    assert (await waits)[1]["engines"][0]["running"] == 0


@pytest.mark.parametrize(
    ("query", "param"), [("", "engine"), ("?engine=decode-0&timeout_s=soon", "timeout_s")]
)
async def test_a_wrong_call_is_refused(admin_stand: AdminStand, query: str, param: str) -> None:
    status, body = await admin_stand.call("POST", f"/pdlaunch/drain{query}")
    assert (status, body["error"]["param"]) == (400, param)
    assert not admin_stand.stand.asked
