"""/v1/chat/completions, /tokenize and /detokenize at one engine."""

from __future__ import annotations

import dataclasses

from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank

HELLO = [{"role": "user", "content": "hello"}]
PROMPT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


async def test_a_chat_is_answered_and_streamed(engine: Engine, rank: FakeRank):
    answer = await engine.chat(max_tokens=3)
    assert (answer["id"][:9], answer["object"]) == ("chatcmpl-", "chat.completion")
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "hello world,", "refusal": None}
    body = {"messages": HELLO, "n": 2, "max_tokens": 3, "return_token_ids": True}
    chunks = await engine.stream(
        "/v1/chat/completions", **body, stream_options={"include_usage": True}
    )
    opening = chunks[0]["choices"]
    assert [choice["delta"] for choice in opening] == [{"role": "assistant", "content": ""}] * 2
    assert chunks[0]["prompt_token_ids"] == rank.ids(PROMPT)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks[:-1])
    for index in range(2):
        mine = [
            chunk["choices"][0] for chunk in chunks[1:-2] if chunk["choices"][0]["index"] == index
        ]
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]
        assert sum(len(choice["token_ids"]) for choice in mine) == 3
    assert chunks[-2]["usage"]["completion_tokens"] == 6


async def test_a_model_without_a_template_has_no_chat(engine: Engine, make_engine):
    loaded = engine.service.loaded
    assert loaded is not None
    engine.service.loaded = dataclasses.replace(loaded, chat_template=None)
    status, error = await engine.refusal("/v1/chat/completions", messages=HELLO)
    assert (status, error["param"]) == (400, "messages")
