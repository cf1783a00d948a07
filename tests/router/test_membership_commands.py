"""Commands to a router alone: engines are added, drained and removed, and none is sent what is not
its own.
"""

from __future__ import annotations

import asyncio

import pytest

from pdlaunch.errors import RequestError
from tests.launch.sidecar.fake_vllm import answer_of
from tests.router.alone_router import PROMPT, Alone, alone

__all__ = ["alone"]


async def test_no_engine_is_sent_a_key_but_its_own(alone: Alone) -> None:
    for name, key in (("prefill-0", None), ("decode-0", "secret-of-decode-0")):
        await alone.start(name)
        alone.add(name, key)
    await alone.until(lambda: alone.pool.serving)
    assert (await alone.complete())[0] == 200
    assert (await alone.command("GET", "/metrics-of-nobody"))[0] == 404
    assert alone.keys["prefill-0"].seen == {None}
    assert alone.keys["decode-0"].seen == {"Bearer secret-of-decode-0"}


async def test_a_drained_engine_gets_no_request_and_keeps_its_proofs(alone: Alone) -> None:
    await alone.pair()
    with pytest.raises(RequestError, match="no engine decode-7; there are: decode-0, prefill-0"):
        alone.watch.set_drained("decode-7", is_drained=True)
    alone.watch.set_drained("decode-0", is_drained=True)
    await alone.until(lambda: alone.engine("decode-0").state == "draining")
    assert (await alone.complete())[0] == 200
    with pytest.raises(RequestError, match="no other engine serves"):
        alone.watch.set_drained("prefill-0", is_drained=True)
    num_canaries = alone.outcomes("proven")
    alone.watch.set_drained("decode-0", is_drained=False)
    await alone.until(lambda: "decode-0" in alone.ready)
    assert alone.outcomes("proven") == num_canaries


@pytest.mark.parametrize("held", ["prefill-0", "decode-0"])
async def test_a_prefill_engine_stays_until_its_blocks_are_read(alone: Alone, held: str) -> None:
    """Whether prefill has answered when the drain begins or not, decode reads what it has."""
    await alone.pair()
    prefill, decode = alone.engines["prefill-0"], alone.engines["decode-0"]
    lender = alone.engine("prefill-0")
    alone.engines[held].go = asyncio.Event()
    num_bodies, num_bytes = len(alone.engines[held].bodies), decode.num_bytes
    answer = asyncio.ensure_future(alone.complete())
    await alone.until(lambda: len(alone.engines[held].bodies) > num_bodies)
    removal = asyncio.ensure_future(alone.watch.remove("prefill-0", 60.0))
    await alone.until(lambda: lender.state == "draining")
    # Another request, which decode answers alone meanwhile.
    assert (await alone.complete())[0] == 200
    assert not removal.done()
    assert (lender.num_works, lender.num_leases) == ((1, 0) if held == "prefill-0" else (0, 1))
    event = alone.engines[held].go
    assert event is not None
    event.set()
    status, told = await answer
    text = "".join(f"<{each}>" for each in answer_of(PROMPT, 4))
    assert (status, told["choices"][0]["text"]) == (200, text)
    assert decode.num_bytes > num_bytes
    assert not prefill.shares
    await removal
    assert "prefill-0" not in {engine.name for engine in alone.pool.engines}
