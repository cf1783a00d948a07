"""A router takes a prompt back; what it also hears of the engine's work."""

from __future__ import annotations

import asyncio

import pytest

from pdlaunch.protocol.costs import EngineCosts, EngineReport, StepCosts
from pdlaunch.protocol.engine import (
    WITHDRAWN,
    AbortRequest,
    AddRequest,
    Outputs,
    RequestFinished,
    WithdrawRequest,
)
from pdlaunch.router.client_request import REMOTE_DECODE
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank, silent

ORIGIN = {"X-Pdlaunch-Origin": "7"}
REPORT = EngineReport(
    9, 2, 300, 4096, EngineCosts(StepCosts(0.1, 0.2, 0.3, 0.4, 0.5), 4, 512, 16, 8192, 1024)
)


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_a_prompt_that_the_rank_gives_back_ends_with_a_code_of_its_own(
    engine: Engine, rank: FakeRank, num_choices: int
) -> None:
    rank.script = silent
    body = {
        "prompt": "x",
        "max_tokens": 1,
        "n": num_choices,
        "kv_transfer_params": REMOTE_DECODE,
    }
    asked = asyncio.ensure_future(engine.post("/v1/completions", body, **{"X-Request-Id": "abc"}))
    added = await rank.wait_for(AddRequest, num_choices)
    _, told, _ = await engine.post("/pdlaunch/withdraw", {"request_id": "abc"})
    assert told == {"found": True}
    (message,) = await rank.wait_for(WithdrawRequest)
    assert message.request_ids == [request.request_id for request in added]
    await rank.say(
        *(
            RequestFinished(request_id=request_id, reason="abort", error=WITHDRAWN)
            for request_id in message.request_ids
        )
    )
    status, answer, _ = await asked
    assert (status, answer["error"]["code"]) == (503, "withdrawn")
    assert added[0].request_id not in [
        one.request_id for one in rank.received if isinstance(one, AbortRequest)
    ]
    _, told, _ = await engine.post("/pdlaunch/withdraw", {"request_id": "abc"})
    assert told == {"found": False}


async def test_withdrawing_needs_a_name(engine: Engine) -> None:
    status, error = await engine.refusal("/pdlaunch/withdraw", request_id=5)
    assert (status, error["param"]) == (400, "request_id")


async def test_routers_of_ours_hear_of_the_work_once_a_step(engine: Engine, rank: FakeRank) -> None:
    """The end of every answer tells of it; clients that are no router hear nothing."""
    await rank.send(Outputs(items=[], report=REPORT))
    _, plain, _ = await engine.post("/v1/completions", {"prompt": "x", "max_tokens": 2})
    assert "pdlaunch_work" not in plain
    for _ in range(2):
        _, told, _ = await engine.post(
            "/v1/completions", {"prompt": "x", "max_tokens": 2}, **ORIGIN
        )
        assert told["pdlaunch_work"][:4] == [9, 2, 300, 4096]
    await rank.send(Outputs(items=[], report=REPORT))
    body = {"prompt": "x", "max_tokens": 5, "stream": True, "return_token_ids": True}
    async with engine.session.post(
        engine.url + "/v1/completions", json=body, headers=ORIGIN
    ) as response:
        text = await response.text()
    assert 1 <= text.count('"pdlaunch_work"') <= 2
