"""The decode side of a hand-over: what decode says of choices that another engine has begun."""

from __future__ import annotations

import pytest

from pdlaunch.engine.server.choice import TextStream
from pdlaunch.protocol.engine import AbortRequest, AddRequest, SamplingParams
from pdlaunch.protocol.kv_params import TokenOutput, to_wire
from tests.engine.server.conftest import END_TOKEN, Engine
from tests.engine.server.fake_rank import FakeRank, remote_kv
from tests.engine.server.test_handover import (
    CHAT,
    HELLO,
    REMOTE_DECODE,
    REMOTE_PREFILL,
    TEXT,
    first_token,
    prefill,
)


async def hand_over(
    engine: Engine, rank: FakeRank, sent: bool, **fields: object
) -> tuple[dict, dict]:
    """A prefill answer, and the body for decode."""
    answer = await prefill(engine, **fields)
    params = answer["kv_transfer_params"]
    if sent:
        params["pdlaunch"]["first_token_sent"] = True
    return answer, fields | {"max_tokens": 12, "kv_transfer_params": params}


@pytest.mark.parametrize("sent", [False, True])
@pytest.mark.parametrize("stop", [[], ["quick"], ["né"], ["zzz"], ["n☃"]])
@pytest.mark.parametrize("text", [TEXT, "☃☃ ☃", "quick né"])
async def test_prefill_and_decode_together_say_what_one_engine_says(
    engine: Engine, rank: FakeRank, text, stop, sent
):
    rank.script = rank.says(text)
    fields = {"n": 2, "stop": stop, "return_token_ids": True, "logprobs": 1}
    alone = await engine.complete(max_tokens=12, **fields)
    answer, body = await hand_over(engine, rank, sent, **fields)
    chunks = await engine.stream(**body, stream_options={"include_usage": True})
    assert chunks.pop() == {"done": True}
    assert chunks.pop()["usage"]["completion_tokens"] == alone["usage"]["completion_tokens"]
    for index, choice in enumerate(alone["choices"]):
        said = answer["choices"][index : index + 1] if sent else []
        said += [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in said) == choice["text"]
        assert [token for part in said for token in part["token_ids"]] == choice["token_ids"]
        offsets = [
            offset
            for part in said
            if part["logprobs"]
            for offset in part["logprobs"]["text_offset"]
        ]
        assert offsets == choice["logprobs"]["text_offset"]
        assert said[-1]["finish_reason"] == choice["finish_reason"]
        assert said[-1]["stop_reason"] == choice["stop_reason"]


async def test_decode_starts_from_the_first_token_and_the_remote_blocks(
    engine: Engine, rank: FakeRank
):
    _, body = await hand_over(engine, rank, sent=True)
    rank.received.clear()
    await engine.complete(**body)
    (request,) = rank.added()
    assert request.remote_kv is not None
    assert request.remote_kv.block_ids == [[1, 2]]
    assert request.output == [TokenOutput(token_id=rank.ids("hello")[0])]
    assert request.sampling.max_tokens == 12


async def test_a_router_without_our_key_gets_every_token_from_decode(
    engine: Engine, rank: FakeRank
):
    answer, body = await hand_over(engine, rank, sent=False)
    del body["kv_transfer_params"]["pdlaunch"]
    decoded = await engine.complete(**body)
    assert rank.added()[-1].output == []
    assert rank.added()[-1].remote_kv is not None
    assert decoded["choices"][0]["text"].startswith(answer["choices"][0]["text"])
    assert decoded["usage"]["completion_tokens"] == 12


async def test_a_router_of_vllm_sends_max_completion_tokens_and_the_clients_other_fields(
    engine: Engine, rank: FakeRank
):
    answer = await engine.chat(
        max_tokens=1,
        max_completion_tokens=1,
        min_tokens=4,
        stream=False,
        stream_options={"include_usage": True},
        kv_transfer_params=REMOTE_DECODE,
    )
    assert answer["kv_transfer_params"]["do_remote_prefill"] is True
    assert answer["choices"][0]["message"]["content"] == "hello"


async def test_decode_does_not_repeat_the_role_that_was_sent(engine: Engine, rank: FakeRank):
    answer = await engine.chat(max_tokens=1, kv_transfer_params=REMOTE_DECODE)
    params = answer["kv_transfer_params"]
    params["pdlaunch"]["first_token_sent"] = True
    chunks = await engine.stream(CHAT, messages=HELLO, max_tokens=3, kv_transfer_params=params)
    assert all(
        "role" not in choice["delta"] for chunk in chunks[:-1] for choice in chunk["choices"]
    )


async def test_choices_that_ended_on_prefill_only_give_their_lease_up(
    engine: Engine, rank: FakeRank
):
    tokens = [{"token_id": rank.ids(END_TOKEN)[0], "finish_reason": "stop"}, {"token_id": 70}]
    request = AddRequest(
        request_id="x/0", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=1)
    )
    params = to_wire(remote_kv(request), None) | {"pdlaunch": {"first_tokens": tokens}}
    answer = await engine.complete(n=2, max_tokens=3, kv_transfer_params=params)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]
    assert answer["usage"]["completion_tokens"] == 4
    (abort,) = await rank.wait_for(AbortRequest)
    assert [add.request_id == abort.request_id for add in rank.added()] == [True, False]
    status, error = await engine.refusal(n=1, kv_transfer_params=params)
    assert (status, error["param"]) == (400, "kv_transfer_params.pdlaunch.first_tokens")


@pytest.mark.parametrize("count", [0, 1, 3, 11, 12])
@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
async def test_a_resumed_stream_says_the_rest(
    engine: Engine, rank: FakeRank, count: int, path: str
):
    rank.script = rank.says(TEXT)
    fields = {"prompt": "hello"} if path == "/v1/completions" else {"messages": HELLO}
    fields |= {"max_tokens": 12, "return_token_ids": True}
    text, token_ids = text_and_tokens(await engine.stream(path, **fields))
    prompt = rank.added()[-1].prompt_token_ids
    given = [{"token_id": token_id} for token_id in token_ids[:count]]
    rest = await engine.stream(path, **fields, resume={"choices": [given], "sent": True})
    seen = TextStream(engine.service.model.tokenizer, prompt)
    sent = "".join(seen.push(token_id) for token_id in token_ids[:count])
    more, more_ids = text_and_tokens(rest)
    assert more_ids == token_ids[count:]
    assert sent + more == text
    assert rest[-2]["choices"][0]["finish_reason"] == "length"
    if count < 12:
        assert [token.token_id for token in rank.added()[-1].output] == token_ids[:count]


def text_and_tokens(chunks: list[dict]) -> tuple[str, list[int]]:
    choices = [choice for chunk in chunks[:-1] for choice in chunk["choices"]]
    texts = [
        choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices
    ]
    return "".join(texts), [
        token_id for choice in choices for token_id in choice.get("token_ids") or []
    ]


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


async def test_a_choice_that_needs_no_more_tokens_gives_its_lease_up(
    engine: Engine, rank: FakeRank
):
    """A router that does not look at first tokens asks decode for a request of one token, too."""
    params = REMOTE_PREFILL | first_token(rank.ids("hello")[0])
    answer = await engine.complete(max_tokens=1, kv_transfer_params=params)
    assert answer["choices"][0]["finish_reason"] == "length"
    (abort,) = await rank.wait_for(AbortRequest)
    (request,) = rank.added()
    assert abort.request_id == request.request_id
    assert request.remote_kv is not None
    assert len(request.output) == 1
