"""The official client works unchanged."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest
import pytest_asyncio

from tests.engine.server.conftest import END_TOKEN, TOKEN, Engine
from tests.engine.server.fake_rank import FakeRank

HELLO = [{"role": "user", "content": "hello"}]


@pytest_asyncio.fixture
async def client(engine: Engine) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=engine.url + "/v1", api_key=TOKEN, max_retries=0
    ) as client:
        yield client


async def test_completions(client: openai.AsyncOpenAI, rank: FakeRank):
    rank.script = rank.says("hello world")
    num_tokens = len(rank.ids("hello world"))
    answer = await client.completions.create(
        model="tiny", prompt="x", max_tokens=num_tokens, logprobs=1, temperature=0
    )
    assert answer.choices[0].text == "hello world"
    assert answer.choices[0].logprobs.token_logprobs == [-0.5] * num_tokens
    assert answer.usage.completion_tokens == num_tokens


async def test_completions_streamed(client: openai.AsyncOpenAI, rank: FakeRank):
    rank.script = rank.says("hello ☃")
    stream = await client.completions.create(
        model="tiny",
        prompt="x",
        max_tokens=len(rank.ids("hello ☃")),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "hello ☃"
    assert chunks[-1].usage.completion_tokens == len(rank.ids("hello ☃"))


async def test_chat(client: openai.AsyncOpenAI, rank: FakeRank):
    rank.script = rank.says(rank.ids("hello ☃") + rank.ids(END_TOKEN), ends=True)
    answer = await client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        n=2,
        logprobs=True,
        top_logprobs=1,
        user="me",
        tools=openai.NOT_GIVEN,
        seed=1,
    )
    assert [choice.message.content for choice in answer.choices] == ["hello ☃"] * 2
    content = answer.choices[0].logprobs.content
    assert (
        bytes(byte for token in content for byte in token.bytes).decode() == "hello ☃" + END_TOKEN
    )
    assert content[0].top_logprobs[0].logprob == -0.5
    again = [*HELLO, answer.choices[0].message, *HELLO]
    await client.chat.completions.create(model="tiny", messages=again, max_completion_tokens=20)


async def test_chat_streamed(client: openai.AsyncOpenAI, rank: FakeRank):
    rank.script = rank.says(rank.ids("hello ☃") + rank.ids(END_TOKEN), ends=True)
    stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello ☃"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_models(client: openai.AsyncOpenAI):
    assert [model.id for model in (await client.models.list()).data] == ["tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_errors(client: openai.AsyncOpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="tiny", prompt="x", best_of=3)
    assert caught.value.param == "best_of"
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="other", prompt="x")
