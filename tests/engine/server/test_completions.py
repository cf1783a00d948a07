"""/v1/completions at one engine."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pdlaunch.config.shared_settings import LimitSettings
from pdlaunch.engine.server.served_model import read_sampling_defaults
from pdlaunch.errors import ConfigError
from pdlaunch.protocol.engine import AbortRequest, AddRequest, RequestFinished, Tokens
from pdlaunch.protocol.kv_params import TokenOutput
from tests.engine.server.conftest import END_TOKEN, TOKEN, Engine
from tests.engine.server.fake_rank import FakeRank, silent
from tests.http.loop_clock import pass_time

TEXT = "hello world, the quick brown fox stops here"


async def test_an_answer_has_text_usage_and_id(engine: Engine, rank: FakeRank):
    rank.script = rank.says("hello world", num_cached_tokens=1)
    num_tokens, num_prompt = len(rank.ids("hello world")), len(rank.ids("hello"))
    status, answer, response = await engine.post(
        "/v1/completions", {"prompt": "hello", "max_tokens": num_tokens}, **{"X-Request-Id": "abc"}
    )
    assert (status, response.headers["X-Request-Id"]) == (200, "abc")
    assert answer.pop("created") > 0
    assert answer == {
        "id": "cmpl-abc",
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "text": "hello world",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }
    (request,) = rank.added()
    assert request.request_id.startswith("abc-")
    assert request.request_id.endswith("/0")


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
    others = {"logit_bias": {"5": 1.5}, "stop_token_ids": [9], "logprobs": 2, "cache_salt": "s"}
    await engine.complete(**fields, **others, prompt=[4, 5, 6], n=2)
    end_token = rank.ids(END_TOKEN)[0]
    expected = fields | {
        "logit_bias": {5: 1.5},
        "stop_token_ids": (9, end_token),
        "eos_token_ids": (end_token,),
        "num_top_logprobs": 2,
    }
    for choice, request in enumerate(rank.added()):
        found = {name: getattr(request.sampling, name) for name in (*expected, "choice")}
        assert found == expected | {"choice": choice}
        assert (request.cache_salt, request.prompt_token_ids) == ("s", [4, 5, 6])


async def test_a_stream_says_the_same_as_the_answer(engine: Engine):
    answer = await engine.complete(max_tokens=8)
    *chunks, usage, done = await engine.stream(max_tokens=8, stream_options={"include_usage": True})
    assert done == {"done": True}
    assert (usage["choices"], usage["usage"]) == ([], answer["usage"])
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer["choices"][0]["text"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert all("usage" not in chunk for chunk in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await engine.stream(max_tokens=3, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]]
    assert (counts, counts[-1]) == (sorted(counts), 3)


async def test_a_streamed_chat_begins_with_the_role_of_each_choice(engine: Engine):
    fields = {"messages": [{"role": "user", "content": "hello"}], "n": 2, "max_tokens": 1}
    opening, *_ = await engine.stream("/v1/chat/completions", **fields)
    deltas = [choice["delta"] for choice in opening["choices"]]
    assert deltas == [{"role": "assistant", "content": ""}] * 2


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    ("include", "text"), [(False, "hello world, the "), (True, "hello world, the quick br")]
)
async def test_a_stop_string_ends_the_text_and_the_request(
    engine: Engine, rank: FakeRank, step: int, include: bool, text: str
):
    rank.script = rank.says(TEXT, step=step)
    fields = {"max_tokens": 60, "stop": ["zzz", "quick br"], "include_stop_str_in_output": include}
    (choice,) = (await engine.complete(**fields))["choices"]
    found = (choice["text"], choice["finish_reason"], choice["stop_reason"])
    assert found == (text, "stop", "quick br")
    (abort,) = await rank.wait_for(AbortRequest)
    assert abort.request_id == rank.added()[0].request_id
    chunks = await engine.stream(**fields)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == text


async def test_an_end_token_is_counted_but_not_shown(engine: Engine, rank: FakeRank):
    token_ids = rank.ids("hello") + rank.ids(END_TOKEN)
    rank.script = rank.says(token_ids, ends=True)
    answer = await engine.complete(return_token_ids=True, skip_special_tokens=False)
    (choice,) = answer["choices"]
    found = (choice["text"], choice["finish_reason"], choice["stop_reason"])
    assert found == ("hello", "stop", None)
    assert choice["token_ids"] == token_ids
    assert choice["prompt_token_ids"] == rank.ids("hello")
    assert answer["usage"]["completion_tokens"] == len(token_ids)
    rank.script = rank.says([40, 41], ends=True)
    (choice,) = (await engine.complete(stop_token_ids=[41]))["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 41)


async def test_logprobs_name_tokens_offsets_and_alternatives(engine: Engine, rank: FakeRank):
    rank.script = rank.says("hello ☃")
    num_tokens = len(rank.ids("hello ☃"))
    (choice,) = (await engine.complete(max_tokens=num_tokens, logprobs=1))["choices"]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == num_tokens
    assert logprobs["token_logprobs"] == [-0.5] * num_tokens
    assert logprobs["top_logprobs"][0] == {"hello": -0.5}
    assert logprobs["tokens"][-1].startswith("bytes:\\x")
    assert logprobs["text_offset"][:2] == [0, 5]
    chunks = await engine.stream(max_tokens=num_tokens, logprobs=1)
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-1]]
    for key, values in logprobs.items():
        assert [value for part in streamed if part for value in part[key]] == values


# Failures


async def test_an_answer_that_takes_too_long_is_a_503(
    make_engine: Callable[..., Any], rank: FakeRank
):
    engine = await make_engine(limits=LimitSettings(request_timeout_s=100.0))
    rank.script = silent
    post = asyncio.create_task(engine.post("/v1/completions", {"prompt": "x"}))
    await rank.wait_for(AddRequest)
    pass_time(100.0)
    status, answer, response = await post
    assert (status, answer["error"]["code"]) == (503, "request_timeout")
    assert response.headers["Retry-After"] == "2"
    await rank.wait_for(AbortRequest)


async def test_a_stream_that_fails_ends_with_an_error_event(engine: Engine, rank: FakeRank):
    token = TokenOutput(token_id=70)
    rank.script = lambda request: [Tokens(request_id=request.request_id, tokens=[token])]
    body = {"prompt": "x", "stream": True}
    async with engine.session.post(engine.url + "/v1/completions", json=body) as response:
        assert (await response.content.readuntil(b"\n\n")).startswith(b"data: {")
        (request,) = rank.added()
        await rank.say(
            RequestFinished(request_id=request.request_id, reason="error", error="no KV blocks")
        )
        rest = await response.text()
    assert json.loads(rest.removeprefix("data: "))["error"]["message"] == "no KV blocks"
    assert "[DONE]" not in rest


@pytest.mark.parametrize("stream", [True, False])
async def test_a_half_closed_connection_is_told_why_it_gets_no_answer(
    engine: Engine, rank: FakeRank, stream: bool
):
    rank.script = silent
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(engine.url).port)
    body = json.dumps({"prompt": "x", "stream": stream}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n"
        % (TOKEN.encode(), len(body))
        + body
    )
    request = (await rank.wait_for(AddRequest))[-1]
    if stream:
        await rank.say(Tokens(request_id=request.request_id, tokens=[TokenOutput(token_id=70)]))
        assert b"200 OK" in await reader.readuntil(b"data: {")
    writer.write_eof()
    rest = await reader.read()
    assert stream or rest.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"connection_half_closed"' in rest
    await rank.wait_for(AbortRequest)
    writer.close()


# The model's generation_config.json says how requests that leave it open are sampled

SAMPLED = {
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.1,
    "repetition_penalty": 1.05,
}
QWEN3 = SAMPLED | {"do_sample": True, "max_new_tokens": 7, "transformers_version": "5.0.0"}
OPEN = SAMPLED | {"presence_penalty": 0.0, "max_tokens": 7}
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.mark.parametrize(
    ("fields", "settings", "expected"),
    [
        ({}, {}, {}),
        (
            {"temperature": 0, "top_k": -1, "top_p": None, "max_tokens": 9},
            {},
            {"temperature": 0, "top_k": 0, "max_tokens": 9},
        ),
        # The neutral value, too, is one that the client has chosen.
        (NEUTRAL, {}, NEUTRAL),
        ({"max_tokens": 8}, {"generation_config": "vllm"}, NEUTRAL | {"max_tokens": 8}),
    ],
)
async def test_what_a_request_leaves_open_is_the_models(
    make_engine: Callable[..., Any],
    rank: FakeRank,
    model_dir: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    settings: dict[str, str],
    expected: dict[str, Any],
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(QWEN3))
    engine = await make_engine(model_dir=str(folder), **settings)
    await engine.chat(**fields)
    sampling = rank.added()[-1].sampling
    assert {name: getattr(sampling, name) for name in OPEN} == OPEN | expected


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"temperature": -1}', "temperature: Input should be greater than or equal to 0, got -1"),
        ('{"top_k": "many"}', "top_k"),
        ("[]", "not a JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_a_broken_file_is_named_with_the_way_out(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_sampling_defaults(tmp_path)
    assert part in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "Correct generation_config.json" in str(caught.value.fix)
