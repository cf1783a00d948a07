"""A lease is called as the router wants; an id that is in use is somebody else's."""

from __future__ import annotations

import asyncio

from pdlaunch.protocol.engine import AddRequest, RequestFinished
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank, silent
from tests.engine.server.test_handover import REMOTE_DECODE

BODY = {
    "prompt": "hello",
    "max_tokens": 1,
    "kv_transfer_params": REMOTE_DECODE | {"pdlaunch": {"lease_id": "mine"}},
}


async def test_the_lease_of_another_request_of_that_name_is_left_alone(
    engine: Engine, rank: FakeRank
):
    """Rank 0 knows that the blocks of an earlier request are still leased."""
    error = "an earlier request mine still has a lease"
    param = "kv_transfer_params.pdlaunch.lease_id"
    answers = rank.script
    rank.script = lambda request: [
        RequestFinished(request_id="mine", reason="error", error=error, error_param=param)
    ]
    status, answer = await engine.refusal(**BODY)
    assert (status, answer["param"]) == (400, param)
    rank.script = answers
    await engine.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert rank.aborted() == []


async def test_a_lease_id_that_is_in_use_is_refused_and_its_request_goes_on(
    engine: Engine, rank: FakeRank
):
    answers, rank.script = rank.script, silent
    first = asyncio.create_task(engine.post("/v1/completions", BODY))
    await rank.wait_for(AddRequest)
    status, error = await engine.refusal(**BODY)
    assert (status, error["param"]) == (400, "kv_transfer_params.pdlaunch.lease_id")
    assert rank.aborted() == []
    (request,) = rank.added()
    for message in answers(request):
        await rank.say(message)
    status, answer, _ = await first
    assert status == 200
    assert answer["kv_transfer_params"]["remote_request_id"] == "mine"
