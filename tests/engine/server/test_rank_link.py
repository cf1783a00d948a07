from __future__ import annotations

import asyncio

from pdlaunch.engine.server.rank_link import RankEvent, RankLink
from pdlaunch.protocol.engine import AbortRequest, AddRequest, RequestFinished, SamplingParams
from pdlaunch.protocol.kv_params import TokenOutput
from pdlaunch.protocol.sockets import SecureContext
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank, silent


def new_link(context: SecureContext, rank: FakeRank) -> RankLink:
    return RankLink(context, rank.endpoint, identity="server", hear=lambda message: None)


def request(name: str, max_tokens: int = 1) -> AddRequest:
    return AddRequest(
        request_id=name, prompt_token_ids=[1], sampling=SamplingParams(max_tokens=max_tokens)
    )


async def test_a_burst_of_messages_loses_none(make_engine, rank: FakeRank):
    """ZMQ's default would drop what a slow server has not read."""
    engine: Engine = await make_engine(max_model_len=20_000)
    answer = await engine.complete(max_tokens=15_000)
    assert answer["usage"]["completion_tokens"] == 15_000


async def test_an_aborted_request_hears_no_more(secure: SecureContext, rank: FakeRank):
    rank.script = silent
    link = new_link(secure, rank)
    heard: list[RankEvent] = []
    last: asyncio.Queue[RankEvent] = asyncio.Queue()
    link.submit(request("a"), heard.append)
    link.submit(request("b"), last.put_nowait)
    await rank.wait_for(AddRequest, 2)
    link.abort("a")
    await rank.wait_for(AbortRequest)
    await rank.say(
        RequestFinished(request_id="a", reason="abort"),
        RequestFinished(request_id="b", reason="length", tokens=[TokenOutput(token_id=1)]),
    )
    await last.get()
    assert heard == []
    await link.close()


async def test_a_malformed_frame_is_dropped(secure: SecureContext, rank: FakeRank, engine: Engine):
    await rank._socket.send_multipart([rank._server, b"nonsense"])
    await engine.complete()
