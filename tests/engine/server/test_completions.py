"""/v1/completions at one engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from pdlaunch.config.shared_settings import LimitSettings
from pdlaunch.protocol.engine import AbortRequest, AddRequest, RequestFinished, Tokens
from pdlaunch.protocol.kv_params import TokenOutput
from tests.engine.server.conftest import END_TOKEN, Engine
from tests.engine.server.fake_rank import FakeRank, silent
from tests.http.loop_clock import pass_time

TEXT = "hello world, the quick brown fox stops here"


async def test_an_answer_has_text_usage_and_id(engine: Engine, rank: FakeRank):
    rank.script = rank.says("hello world", num_cached_tokens=1)
    num_tokens = len(rank.ids("hello world"))
    status, answer, response = await engine.post(
        "/v1/completions", {"prompt": "hello", "max_tokens": num_tokens}, **{"X-Request-Id": "abc"}
    )
    assert status == 200
    assert response.headers["X-Request-Id"] == "abc"
    assert answer["id"] == "cmpl-abc"
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "hello world",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    num_prompt_tokens = len(rank.ids("hello"))
    assert answer["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


async def test_all_sampling_fields_reach_the_rank(engine: Engine, rank: FakeRank):
    fields = {
        "max_tokens": 3,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 5,
    }
    await engine.complete(
        **fields,
        logit_bias={"5": 1.5},
        stop_token_ids=[9],
        logprobs=2,
        cache_salt="s",
        prompt=[4, 5, 6],
        n=2,
    )
    first, second = rank.added()
    for name, value in fields.items():
        assert getattr(first.sampling, name) == value
    end_token = rank.ids(END_TOKEN)[0]
    assert first.sampling.logit_bias == {5: 1.5}
    assert first.sampling.stop_token_ids == (9, end_token)
    assert first.sampling.eos_token_ids == (end_token,)
    assert first.sampling.num_top_logprobs == 2
    assert (first.cache_salt, first.prompt_token_ids) == ("s", [4, 5, 6])
    assert (first.sampling.choice, second.sampling.choice) == (0, 1)
    assert second.sampling.seed == 5


async def test_defaults_are_neutral_and_the_seed_is_drawn(engine: Engine, rank: FakeRank):
    await engine.complete(top_k=-1)
    await engine.complete(ignore_eos=True)
    first, second = rank.added()
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (1.0, 1.0, 0)
    assert first.sampling.max_tokens == 16
    assert first.sampling.num_top_logprobs is None
    assert 0 <= first.sampling.seed < 2**63
    assert first.sampling.seed != second.sampling.seed
    assert second.sampling.stop_token_ids == ()


async def test_a_stream_says_the_same_as_the_answer(engine: Engine, rank: FakeRank):
    answer = await engine.complete(max_tokens=8)
    chunks = await engine.stream(max_tokens=8, stream_options={"include_usage": True})
    assert chunks.pop() == {"done": True}
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"] == answer["usage"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (
        len(chunks) - 1
    ) + ["length"]
    assert all("usage" not in chunk for chunk in chunks)


async def test_continuous_usage_counts_up(engine: Engine):
    chunks = await engine.stream(
        max_tokens=3, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 3


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    ("include", "text"), [(False, "hello world, the "), (True, "hello world, the quick br")]
)
async def test_a_stop_string_ends_the_text_and_the_request(
    engine: Engine, rank: FakeRank, step: int, include: bool, text: str
):
    rank.script = rank.says(TEXT, step=step)
    fields = {"max_tokens": 60, "stop": ["zzz", "quick br"], "include_stop_str_in_output": include}
    answer = await engine.complete(**fields)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        text,
        "stop",
        "quick br",
    )
    (abort,) = await rank.wait_for(AbortRequest)
    assert abort.request_id == rank.added()[0].request_id
    chunks = await engine.stream(**fields)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == text


async def test_the_model_s_end_token_is_counted_but_not_shown(engine: Engine, rank: FakeRank):
    rank.script = rank.says(rank.ids("hello") + rank.ids(END_TOKEN), ends=True)
    answer = await engine.complete(return_token_ids=True, skip_special_tokens=False)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        "hello",
        "stop",
        None,
    )
    assert choice["token_ids"] == rank.ids("hello") + rank.ids(END_TOKEN)
    assert choice["prompt_token_ids"] == rank.ids("hello")
    assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])


async def test_a_stop_token_is_named(engine: Engine, rank: FakeRank):
    rank.script = rank.says([40, 41], ends=True)
    (choice,) = (await engine.complete(stop_token_ids=[41]))["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 41)


async def test_token_ids_come_with_the_text_of_exactly_these_tokens(engine: Engine, rank: FakeRank):
    rank.script = rank.says("né ☃ hello")
    chunks = await engine.stream(max_tokens=len(rank.ids("né ☃ hello")), return_token_ids=True)
    tokens, text = [], ""
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        tokens += choice["token_ids"]
        text += choice["text"]
        whole = engine.service.model.tokenizer.decode(tokens, skip_special_tokens=True)
        assert text == whole.rstrip("�")
    assert text == "né ☃ hello"
    assert chunks[0]["choices"][0]["prompt_token_ids"] == rank.ids("hello")


async def test_logprobs_name_tokens_offsets_and_alternatives(engine: Engine, rank: FakeRank):
    rank.script = rank.says("hello ☃")
    num_tokens = len(rank.ids("hello ☃"))
    (choice,) = (await engine.complete(max_tokens=num_tokens, logprobs=1))["choices"]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == num_tokens
    assert logprobs["token_logprobs"] == [-0.5] * num_tokens
    assert logprobs["tokens"][0] == "hello"
    assert logprobs["top_logprobs"][0] == {"hello": -0.5}
    assert logprobs["tokens"][-1].startswith("bytes:\\x")
    assert logprobs["text_offset"][:2] == [0, 5]
    chunks = await engine.stream(max_tokens=num_tokens, logprobs=1)
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-1]]
    for key, values in logprobs.items():
        assert [value for part in streamed if part for value in part[key]] == values


async def test_trace_and_request_id_are_passed_on(
    engine: Engine, rank: FakeRank, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "pdlaunch")
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await engine.post(
        "/v1/completions", {"prompt": "x"}, traceparent=traceparent, **{"X-Request-Id": "r"}
    )
    (request,) = rank.added()
    assert traceparent not in caplog.text
    assert request.request_id.startswith("r-")
    assert request.request_id.endswith("/0")


async def test_a_client_that_leaves_aborts_its_request(engine: Engine, rank: FakeRank):
    rank.script = silent
    post = asyncio.create_task(engine.complete())
    (request,) = await rank.wait_for(AddRequest)
    post.cancel()
    (abort,) = await rank.wait_for(AbortRequest)
    assert abort.request_id == request.request_id
    await asyncio.gather(post, return_exceptions=True)


async def test_a_request_that_fails_is_a_500(engine: Engine, rank: FakeRank):
    def fails(request: AddRequest):
        yield Tokens(request_id=request.request_id, tokens=[TokenOutput(token_id=70)])
        yield RequestFinished(request_id=request.request_id, reason="error", error="no KV blocks")

    rank.script = fails
    status, error = await engine.refusal()
    assert (status, error["message"], error["code"]) == (500, "no KV blocks", "engine_error")


async def test_a_stream_that_fails_ends_with_an_error_event(engine: Engine, rank: FakeRank):
    async with running_stream(engine, rank) as (request, response):
        await rank.say(
            RequestFinished(request_id=request.request_id, reason="error", error="no KV blocks")
        )
        rest = await response.text()
    assert json.loads(rest.removeprefix("data: "))["error"]["message"] == "no KV blocks"
    assert "[DONE]" not in rest


async def test_an_answer_that_takes_too_long_is_a_503(make_engine, rank: FakeRank):
    engine = await make_engine(limits=LimitSettings(request_timeout_s=100.0))
    rank.script = silent
    post = asyncio.create_task(engine.post("/v1/completions", {"prompt": "x"}))
    await rank.wait_for(AddRequest)
    pass_time(100.0)
    status, answer, response = await post
    assert (status, answer["error"]["code"], response.headers["Retry-After"]) == (
        503,
        "request_timeout",
        "1",
    )
    await rank.wait_for(AbortRequest)


@contextlib.asynccontextmanager
async def running_stream(
    engine: Engine, rank: FakeRank
) -> AsyncIterator[tuple[AddRequest, aiohttp.ClientResponse]]:
    """A stream whose first token has come; its rank says nothing more by itself."""
    rank.script = silent
    body = {"prompt": "x", "stream": True}
    post = asyncio.create_task(engine.session.post(engine.url + "/v1/completions", json=body))
    request = (await rank.wait_for(AddRequest))[-1]
    await rank.say(Tokens(request_id=request.request_id, tokens=[TokenOutput(token_id=70)]))
    async with await post as response:
        assert (await response.content.readuntil(b"\n\n")).startswith(b"data: {")
        yield request, response


async def test_a_new_rank_fails_the_requests_of_the_old_one(engine: Engine, rank: FakeRank):
    rank.script = silent
    post = asyncio.create_task(engine.refusal())
    await rank.wait_for(AddRequest)
    await engine.service.use_link(None)
    status, error = await post
    assert (status, error["code"]) == (503, "engine_restarting")
    status, error = await engine.refusal()
    assert (status, error["code"]) == (503, "engine_starting")
    async with engine.session.get(engine.url + "/health") as response:
        assert response.status == 503
