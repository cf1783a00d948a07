"""A lease is called as the router wants; an id that is in use is somebody else's."""

from __future__ import annotations

import asyncio

from pdlaunch.protocol.engine import AddRequest
from tests.server.conftest import Engine
from tests.server.fake_rank import FakeRank, silent
from tests.server.test_handover import REMOTE_DECODE

BODY = {"prompt": "hello", "max_tokens": 1, "kv_transfer_params": REMOTE_DECODE | {"pdlaunch": {"lease_id": "mine"}}}


async def test_a_lease_id_that_is_in_use_is_refused_and_its_request_goes_on(engine: Engine, rank: FakeRank):
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
