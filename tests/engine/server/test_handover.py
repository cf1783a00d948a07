"""Both sides of a hand-over, with routers that know pdlaunch and routers that do not."""

from __future__ import annotations

import asyncio

import pytest

from pdlaunch.protocol.engine import AbortRequest, AddRequest, RequestFinished
from pdlaunch.protocol.kv_params import TokenOutput
from tests.engine.server.conftest import END_TOKEN, Engine
from tests.engine.server.fake_rank import FakeRank, silent

TEXT = "né ☃ quick stops"
REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


async def prefill(engine: Engine, **fields: object) -> dict:
    return await engine.complete(**{"max_tokens": 1, "kv_transfer_params": REMOTE_DECODE} | fields)


async def test_prefill_answers_with_the_lease_and_the_first_token(engine: Engine, rank: FakeRank):
    answer = await prefill(engine, logprobs=1, min_tokens=5)
    (request,) = rank.added()
    assert (request.do_remote_decode, request.num_readers) == (True, 1)
    assert (request.sampling.max_tokens, request.sampling.min_tokens) == (1, 5)
    params = answer["kv_transfer_params"]
    assert params["do_remote_prefill"] is True
    assert params["remote_request_id"] == request.request_id
    (first,) = params["pdlaunch"]["first_tokens"]
    assert first == {
        "token_id": rank.ids("hello")[0],
        "logprob": -0.5,
        "top_logprobs": [[rank.ids("hello")[0], -0.5]],
    }
    assert answer["choices"][0]["finish_reason"] == "length"
    assert rank.aborted() == []


async def test_prefill_holds_back_half_characters_and_begun_stop_strings(
    engine: Engine, rank: FakeRank
):
    rank.script = rank.says("☃")
    assert (await prefill(engine))["choices"][0]["text"] == ""
    rank.script = rank.says("hello")
    assert (await prefill(engine, stop=["hello world"]))["choices"][0]["text"] == ""
    assert (await prefill(engine, stop=["hello!", "zz"]))["choices"][0]["text"] == ""
    assert (await prefill(engine, stop=["zz"]))["choices"][0]["text"] == "hello"


@pytest.mark.parametrize("fields", [{"stop": ["hel"]}, {}])
async def test_a_first_token_that_ends_the_request_ends_the_lease(
    engine: Engine, rank: FakeRank, fields
):
    rank.script = rank.says("hello" if fields else rank.ids(END_TOKEN), ends=not fields)
    answer = await prefill(engine, **fields)
    assert answer["kv_transfer_params"] is None
    assert answer["choices"][0]["finish_reason"] == "stop"
    (abort,) = await rank.wait_for(AbortRequest)
    assert abort.request_id == rank.added()[0].request_id


async def test_prefill_leases_once_for_all_choices_and_says_how_many_go_on(
    engine: Engine, rank: FakeRank
):
    def script(request: AddRequest):
        text = "stops" if request.sampling.choice == 1 else "hello"
        return rank.says(rank.ids(text)[:1])(request)

    rank.script = script
    answer = await prefill(engine, n=3, stop=["s"])
    assert [(request.do_remote_decode, request.num_readers) for request in rank.added()] == [
        (True, 3),
        (False, 1),
        (False, 1),
    ]
    finish_reasons = [
        token.get("finish_reason")
        for token in answer["kv_transfer_params"]["pdlaunch"]["first_tokens"]
    ]
    assert finish_reasons == [None, "stop", None]


async def test_without_leased_blocks_the_first_tokens_are_handed_over_alone(
    engine: Engine, rank: FakeRank
):
    def script(request: AddRequest):
        is_first = request.sampling.choice == 0
        token_id = rank.ids(END_TOKEN if is_first else "hello")[0]
        yield RequestFinished(
            request_id=request.request_id,
            reason="stop" if is_first else "length",
            tokens=[TokenOutput(token_id=token_id)],
            stop_token_id=token_id if is_first else None,
        )

    rank.script = script
    params = (await prefill(engine, n=2))["kv_transfer_params"]
    assert params["do_remote_prefill"] is False
    rank.script = rank.says("hello world")
    answer = await engine.complete(n=2, max_tokens=4, kv_transfer_params=params)
    last = rank.added()[-1]
    assert last.remote_kv is None
    assert last.output == [TokenOutput(token_id=rank.ids("hello")[0])]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]


REMOTE_PREFILL = {
    "do_remote_prefill": True,
    "remote_engine_id": "e1",
    "remote_request_id": "r",
    "remote_host": "127.0.0.1",
    "remote_port": 5555,
    "remote_block_ids": [[1]],
    "remote_num_tokens": 5,
}


def first_token(token_id: int, **fields: object) -> dict:
    return {"pdlaunch": {"first_tokens": [{"token_id": token_id} | fields]}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 2}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"stream": True}, "stream"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"resume": {"choices": [[]]}}, "resume"),
        (
            {"kv_transfer_params": {"do_remote_decode": "yes"}},
            "kv_transfer_params.do_remote_decode",
        ),
        (
            {"kv_transfer_params": {"do_remote_prefill": True}},
            "kv_transfer_params.remote_engine_id",
        ),
        (
            {"kv_transfer_params": REMOTE_PREFILL | {"remote_num_tokens": 2**64}},
            "kv_transfer_params.remote_num_tokens",
        ),
        (
            {"kv_transfer_params": REMOTE_PREFILL | {"remote_block_ids": [[2**64]]}},
            "kv_transfer_params.remote_block_ids[0][0]",
        ),
        ({"kv_transfer_params": first_token(10**9)}, "kv_transfer_params.pdlaunch.first_tokens"),
        (
            {"kv_transfer_params": first_token(5, top_logprobs=[[10**9, -1.0]])},
            "kv_transfer_params.pdlaunch.first_tokens",
        ),
        (
            {"kv_transfer_params": first_token(2**64)},
            "kv_transfer_params.pdlaunch.first_tokens[0].token_id",
        ),
    ],
)
async def test_hand_overs_that_are_refused(engine: Engine, fields, param):
    body = {"prompt": "x", "max_tokens": 1, "kv_transfer_params": REMOTE_DECODE} | fields
    status, error = await engine.refusal(**body)
    assert (status, error["param"]) == (400, param)


async def test_a_router_that_leaves_ends_the_lease(engine: Engine, rank: FakeRank):
    rank.script = silent
    post = asyncio.create_task(prefill(engine))
    (request,) = await rank.wait_for(AddRequest)
    post.cancel()
    await asyncio.gather(post, return_exceptions=True)
    aborts = await rank.wait_for(AbortRequest)
    assert aborts[0].request_id == request.request_id


@pytest.mark.parametrize("by", ["request id", "remote id"])
async def test_a_lease_can_be_released(engine: Engine, rank: FakeRank, by: str):
    body = {"prompt": "x", "max_tokens": 1, "kv_transfer_params": REMOTE_DECODE}
    _, answer, _ = await engine.post("/v1/completions", body, **{"X-Request-Id": "abc"})
    remote_id = answer["kv_transfer_params"]["remote_request_id"]
    name = {"request_id": "abc" if by == "request id" else remote_id}
    _, released, _ = await engine.post("/pdlaunch/release", name)
    assert released == {"released": True}
    assert [abort.request_id for abort in await rank.wait_for(AbortRequest)] == [remote_id]
    _, released, _ = await engine.post("/pdlaunch/release", {"request_id": "other"})
    assert released == {"released": False}


async def test_an_engine_of_both_roles_refuses_blocks_and_takes_first_tokens(make_engine):
    both = await make_engine(name="both-0", role="both")
    params = (await prefill(await make_engine()))["kv_transfer_params"]
    for path, fields in (("/v1/completions", {}), (CHAT, {"messages": HELLO})):
        for asked in (REMOTE_DECODE, params):
            status, error = await both.refusal(
                path, max_tokens=1, kv_transfer_params=asked, **fields
            )
            assert (status, error["param"]) == (400, "kv_transfer_params")
            assert "pulls none" in error["message"]
    only_tokens = {"do_remote_prefill": False, "do_remote_decode": False}
    continued = only_tokens | {"pdlaunch": params["pdlaunch"] | {"first_token_sent": True}}
    assert (await both.complete(max_tokens=5, kv_transfer_params=continued))["choices"]
