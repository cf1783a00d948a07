"""Both sides of a hand-over, with routers that know pdlaunch and routers that do not; and what a
choice says that another engine has begun.
"""

import asyncio
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest

from pdlaunch.engine.server.choice import TextStream
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
REMOTE_PREFILL = {
    "do_remote_prefill": True,
    "remote_engine_id": "e1",
    "remote_request_id": "r",
    "remote_host": "127.0.0.1",
    "remote_port": 5555,
    "remote_block_ids": [[1]],
    "remote_num_tokens": 5,
}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
PLACE = "kv_transfer_params.pdlaunch.first_tokens"


def first_tokens(*tokens: dict[str, Any]) -> dict[str, Any]:
    return {"pdlaunch": {"first_tokens": list(tokens)}}


async def prefill(engine: Engine, **fields: object) -> dict:
    return await engine.complete(**{"max_tokens": 1, "kv_transfer_params": REMOTE_DECODE} | fields)


async def hand_over(engine: Engine, sent: bool, **fields: object) -> tuple[dict, dict]:
    answer = await prefill(engine, **fields)
    params = answer["kv_transfer_params"]
    if sent:
        params["pdlaunch"]["first_token_sent"] = True
    return answer, fields | {"max_tokens": 12, "kv_transfer_params": params}


# Prefill


async def test_prefill_answers_with_the_lease_and_the_first_token(engine: Engine, rank: FakeRank):
    answer = await prefill(engine, logprobs=1, min_tokens=5)
    (request,) = rank.added()
    assert (request.do_remote_decode, request.num_readers) == (True, 1)
    assert (request.sampling.max_tokens, request.sampling.min_tokens) == (1, 5)
    params, token_id = answer["kv_transfer_params"], rank.ids("hello")[0]
    assert params["do_remote_prefill"] is True
    assert params["remote_request_id"] == request.request_id
    token = {"token_id": token_id, "logprob": -0.5, "top_logprobs": [[token_id, -0.5]]}
    assert params["pdlaunch"]["first_tokens"] == [token]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert not [message for message in rank.received if isinstance(message, AbortRequest)]


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


async def test_prefill_leases_once_for_all_choices_and_says_which_go_on(
    engine: Engine, rank: FakeRank
):
    words = ("hello", "stops", "hello")
    rank.script = lambda request: rank.says(rank.ids(words[request.sampling.choice])[:1])(request)
    answer = await prefill(engine, n=3, stop=["s"])
    found = [(request.do_remote_decode, request.num_readers) for request in rank.added()]
    assert found == [(True, 3), (False, 1), (False, 1)]
    tokens = answer["kv_transfer_params"]["pdlaunch"]["first_tokens"]
    assert [token.get("finish_reason") for token in tokens] == [None, "stop", None]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 2}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"stream": True}, "stream"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"resume": {"choices": [[]]}}, "resume"),
        ({"do_remote_decode": "yes"}, "kv_transfer_params.do_remote_decode"),
        ({"do_remote_prefill": True}, "kv_transfer_params.remote_engine_id"),
        (REMOTE_PREFILL | {"remote_num_tokens": 2**64}, "kv_transfer_params.remote_num_tokens"),
        (
            REMOTE_PREFILL | {"remote_block_ids": [[2**64]]},
            "kv_transfer_params.remote_block_ids[0][0]",
        ),
        (first_tokens({"token_id": 10**9}), PLACE),
        (first_tokens({"token_id": 5, "top_logprobs": [[10**9, -1.0]]}), PLACE),
        (first_tokens({"token_id": 5}, {"token_id": 6}), PLACE),
        (first_tokens({"token_id": 2**64}), f"{PLACE}[0].token_id"),
    ],
)
async def test_hand_overs_that_are_refused(engine: Engine, fields: dict[str, Any], param: str):
    body = {"prompt": "x", "max_tokens": 1, "kv_transfer_params": REMOTE_DECODE}
    is_params = param.startswith("kv_transfer_params")
    status, error = await engine.refusal(
        **body | ({"kv_transfer_params": fields} if is_params else fields)
    )
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
    _, answer, _ = await engine.post(COMPLETIONS, body, **{"X-Request-Id": "abc"})
    remote_id = answer["kv_transfer_params"]["remote_request_id"]
    for name, is_known in (("abc" if by == "request id" else remote_id, True), ("other", False)):
        _, released, _ = await engine.post("/pdlaunch/release", {"request_id": name})
        assert released == {"released": is_known}
    assert [abort.request_id for abort in await rank.wait_for(AbortRequest)] == [remote_id]


# Decode


@pytest.mark.parametrize("sent", [False, True])
@pytest.mark.parametrize("stop", [[], ["quick"], ["né"], ["zzz"], ["n☃"]])
@pytest.mark.parametrize("text", [TEXT, "☃☃ ☃", "quick né"])
async def test_prefill_and_decode_together_say_what_one_engine_says(
    engine: Engine, rank: FakeRank, text, stop, sent
):
    rank.script = rank.says(text)
    fields = {"n": 2, "stop": stop, "return_token_ids": True, "logprobs": 1}
    alone = await engine.complete(max_tokens=12, **fields)
    answer, body = await hand_over(engine, sent, **fields)
    *chunks, usage, done = await engine.stream(**body, stream_options={"include_usage": True})
    assert done == {"done": True}
    assert usage["usage"]["completion_tokens"] == alone["usage"]["completion_tokens"]
    for index, choice in enumerate(alone["choices"]):
        said = answer["choices"][index : index + 1] if sent else []
        said += [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in said) == choice["text"]
        assert [token for part in said for token in part["token_ids"]] == choice["token_ids"]
        logprobs = [part["logprobs"]["text_offset"] for part in said if part["logprobs"]]
        assert [*chain(*logprobs)] == choice["logprobs"]["text_offset"]
        for name in ("finish_reason", "stop_reason"):
            assert said[-1][name] == choice[name]


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
    assert (last.remote_kv, last.output) == (None, [TokenOutput(token_id=rank.ids("hello")[0])])
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]


async def test_a_choice_that_is_over_only_gives_its_lease_up(engine: Engine, rank: FakeRank):
    given = {"token_id": rank.ids("hello")[0]}
    params = REMOTE_PREFILL | first_tokens(given | {"finish_reason": "stop"}, given)
    answer = await engine.complete(kv_transfer_params=params, n=2, max_tokens=3)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]
    (abort,) = await rank.wait_for(AbortRequest)
    over, other = rank.added()
    assert abort.request_id == over.request_id
    assert all(each.remote_kv is not None and len(each.output) == 1 for each in (over, other))


async def test_an_engine_of_both_roles_refuses_blocks_and_takes_first_tokens(
    make_engine: Callable[..., Any],
):
    both = await make_engine(name="both-0", role="both")
    params = (await prefill(await make_engine()))["kv_transfer_params"]
    for path, fields in ((COMPLETIONS, {}), (CHAT, {"messages": HELLO})):
        for asked in (REMOTE_DECODE, params):
            status, error = await both.refusal(
                path, max_tokens=1, kv_transfer_params=asked, **fields
            )
            assert (status, error["param"]) == (400, "kv_transfer_params")
            assert "nor pulls" in error["message"]
    only_tokens = {"do_remote_prefill": False, "do_remote_decode": False}
    continued = only_tokens | {"pdlaunch": params["pdlaunch"] | {"first_token_sent": True}}
    assert (await both.complete(max_tokens=5, kv_transfer_params=continued))["choices"]


# Resumed streams


def text_and_tokens(chunks: list[dict]) -> tuple[str, list[int]]:
    choices = [choice for chunk in chunks[:-1] for choice in chunk["choices"]]
    texts = [
        choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices
    ]
    return "".join(texts), [*chain(*(choice.get("token_ids") or [] for choice in choices))]


@pytest.mark.parametrize("count", [0, 1, 3, 11, 12])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_resumed_stream_says_the_rest(
    engine: Engine, rank: FakeRank, count: int, path: str
):
    rank.script = rank.says(TEXT)
    fields = {"prompt": "hello"} if path == COMPLETIONS else {"messages": HELLO}
    fields |= {"max_tokens": 12, "return_token_ids": True}
    text, token_ids = text_and_tokens(await engine.stream(path, **fields))
    prompt = rank.added()[-1].prompt_token_ids
    given = [{"token_id": token_id} for token_id in token_ids[:count]]
    rest = await engine.stream(path, **fields, resume={"choices": [given], "sent": True})
    seen = TextStream(engine.service.model.tokenizer, prompt)
    sent = "".join(map(seen.push, token_ids[:count]))
    more, more_ids = text_and_tokens(rest)
    assert more_ids == token_ids[count:]
    assert sent + more == text
    assert rest[-2]["choices"][0]["finish_reason"] == "length"
    if count < 12:
        assert [token.token_id for token in rank.added()[-1].output] == token_ids[:count]


async def test_a_resume_that_nobody_has_seen_is_said_in_full(engine: Engine, rank: FakeRank):
    rank.script = rank.says(TEXT)
    whole = await engine.complete(max_tokens=12)
    given = [{"token_id": token_id} for token_id in rank.ids(TEXT)[:3]]
    again = await engine.complete(max_tokens=12, resume={"choices": [given], "sent": False})
    assert again["choices"] == whole["choices"]
    assert again["usage"] == whole["usage"]


async def test_a_resumed_choice_that_was_over_says_no_more(engine: Engine, rank: FakeRank):
    over = [{"token_id": rank.ids(END_TOKEN)[0], "finish_reason": "stop"}]
    chunks = await engine.stream(n=2, max_tokens=3, resume={"choices": [over, []], "sent": True})
    assert {chunk["choices"][0]["index"] for chunk in chunks[:-1]} == {1}
    assert len(rank.added()) == 1
