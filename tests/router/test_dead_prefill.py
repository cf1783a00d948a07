"""A prefill engine dies after its answer: decode gets its params all the same, and computes the
prompt again if the blocks are gone.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.router.conftest import Stand, pair
from tests.router.test_life_of_a_request import completion, expected_text


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("publishes", ["its rank is gone", "all of it is gone"])
async def test_decode_gets_the_params_of_a_prefill_engine_that_has_died_since(
    stand: Stand, stream: bool, publishes: str
) -> None:
    prefill, decode = pair()
    prefill.hold_prefill = True
    await stand.start([prefill, decode])
    request = asyncio.ensure_future(stand.post(completion(stream=stream)))
    await prefill.holding.wait()
    if publishes == "its rank is gone":
        stand.publish(starting=["prefill-0"])
    else:
        stand.publish(without=["prefill-0"])
    prefill.go.set()
    assert (await request).texts() == {0: expected_text("hello", 6)}
    params = decode.seen[0].body["kv_transfer_params"]
    assert params["do_remote_prefill"] is True
    assert params["remote_request_id"] in prefill.leases
    assert params["pdlaunch"]["first_token_sent"] is True
    assert len(prefill.seen) == len(decode.seen) == 1
