"""Where an engine says no, and how: bodies, fields, limits; and what large inputs cost."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from pdlaunch.config.shared_settings import LimitSettings
from pdlaunch.engine.server import engine_service, served_model
from pdlaunch.http.headers import IGNORED_FIELDS_HEADER
from pdlaunch.protocol.engine import AddRequest
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank, silent

HELLO = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": HELLO},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
MakeEngine = Callable[..., Any]


# Fields


@pytest.mark.parametrize("path", BODIES)
async def test_unknown_fields_are_ignored_and_named(engine: Engine, path: str) -> None:
    body = BODIES[path] | {"max_tokens": 2} if path.startswith("/v1") else BODIES[path]
    status, _, response = await engine.post(path, body)
    assert (status, IGNORED_FIELDS_HEADER in response.headers) == (200, False)
    status, _, response = await engine.post(path, body | {"no_stop_trim": 1, "nonsense": 2})
    assert (status, response.headers[IGNORED_FIELDS_HEADER]) == (200, "no_stop_trim, nonsense")


async def test_a_field_that_vllm_has_names_vllm(engine: Engine) -> None:
    for name, value, has in (("prompt_embeds", "x", True), ("best_of", 3, False)):
        status, answer, _ = await engine.post("/v1/completions", {"prompt": "x", name: value})
        assert (status, answer["error"]["param"]) == (400, name)
        assert ("engines of vLLM have it: --engine vllm" in answer["error"]["message"]) == has


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"prompt": ""}, 400, "prompt", None),
        ({"prompt": [512]}, 400, "prompt", None),
        ({"prompt": [5] * 100}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * 90, "max_tokens": 11}, 400, "max_tokens", "context_length_exceeded"),
        ({"prompt": "a" * (2**18 + 1)}, 400, "prompt", "context_length_exceeded"),
        ({"logit_bias": {"512": 1}}, 400, "logit_bias", None),
        ({"stop_token_ids": [512]}, 400, "stop_token_ids", None),
        ({"max_tokens": 0}, 400, "max_tokens", None),
        ({"regex": "a+"}, 400, "regex", "unsupported_parameter"),
        ({"n": 9}, 400, "n", None),
        ({"prompt": ["a"] * 9}, 400, "prompt", None),
    ],
)
async def test_requests_that_are_refused(
    engine: Engine, rank: FakeRank, fields, status, param, code
):
    answered, error = await engine.refusal(**fields)
    assert (answered, error["param"], error["code"]) == (status, param, code)
    assert rank.added() == []
    assert engine.service.admission.in_flight == 0


async def test_the_longest_prompt_leaves_room_for_one_token(engine: Engine, rank: FakeRank):
    await engine.complete(prompt=[5] * 99)
    assert rank.added()[0].sampling.max_tokens == 1


async def test_the_context_is_no_longer_than_the_kv_cache(make_engine: MakeEngine, rank: FakeRank):
    rank.max_model_len = 30
    engine = await make_engine()
    await engine.chat()
    (asked,) = rank.added()
    assert len(asked.prompt_token_ids) + asked.sampling.max_tokens == 30
    for fields, param in (
        ({"messages": [{"role": "user", "content": "hello " * 30}]}, "messages"),
        ({"messages": HELLO, "max_tokens": 30}, "max_tokens"),
    ):
        status, error = await engine.refusal("/v1/chat/completions", **fields)
        assert (status, error["param"]) == (400, param)
        assert "30 tokens (as many as the KV cache holds, see kv_cache_memory)" in error["message"]
    _, models = await engine.get("/v1/models")
    assert models["data"][0]["max_model_len"] == 30


async def test_a_model_without_a_template_has_no_chat(engine: Engine):
    loaded = engine.service.loaded
    assert loaded is not None
    engine.service.loaded = dataclasses.replace(loaded, chat_template=None)
    status, error = await engine.refusal("/v1/chat/completions", messages=HELLO)
    assert (status, error["param"]) == (400, "messages")


# Limits


async def test_a_full_engine_is_a_429(make_engine: MakeEngine, rank: FakeRank):
    engine = await make_engine(limits=LimitSettings(max_queued_requests=2))
    rank.script = silent
    running = asyncio.create_task(engine.complete(n=2, max_tokens=1))
    requests = await rank.wait_for(AddRequest, 2)
    for path, body in BODIES.items():
        status, answer, response = await engine.post(path, body)
        assert (status, answer["error"]["code"]) == (429, "too_many_requests")
        assert response.headers["Retry-After"] == "1"
    rank.script = rank.says("hello")
    for request in requests:
        for item in rank.script(request):
            await rank.say(item)
    await running
    await engine.complete(n=2)


async def test_too_many_grammars_without_a_first_token_are_a_429(
    engine: Engine, rank: FakeRank, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_service, "MAX_NEW_GRAMMARS", 2)
    rank.script = silent
    fields = {"prompt": "x", "max_tokens": 2}
    body = fields | {"guided_regex": "a+", "stream": True}
    compiled = asyncio.ensure_future(engine.session.post(engine.url + "/v1/completions", json=body))
    (request,) = await rank.wait_for(AddRequest)
    waiting = [asyncio.create_task(engine.complete(guided_regex="b+", **fields)) for _ in range(2)]
    (_, *others) = await rank.wait_for(AddRequest, 3)
    status, error = await engine.refusal(guided_regex="c+")
    assert (status, error["code"]) == (429, "too_many_grammars")
    rank.script = rank.says("a")
    first, last = rank.script(request)
    await rank.say(first)
    async with await compiled as stream:
        await engine.complete(guided_regex="c+", **fields)
        await rank.say(last, *(item for each in others for item in rank.script(each)))
        assert b"[DONE]" in await stream.read()
    await asyncio.gather(*waiting)
    for regex in ("d+", "e+", "f+"):
        await engine.complete(guided_regex=regex, **fields)


async def test_tokenize_and_detokenize_are_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served_model, "MIN_TEXT_CHARS", 2000)
    monkeypatch.setattr(served_model, "MIN_TOKEN_IDS", 2000)
    engine.service.sleep.settle(["kv_cache"])  # an engine that sleeps tokenizes
    assert (await engine.post("/tokenize", {"prompt": "a" * 2000}))[0] == 200
    assert (await engine.post("/detokenize", {"tokens": [5] * 2000}))[0] == 200
    chat = [{"role": "user", "content": "a" * 2000}]
    for path, body, param in [
        ("/tokenize", {"prompt": "a" * 2001}, "prompt"),
        ("/tokenize", {"messages": chat}, "messages"),
        ("/detokenize", {"tokens": [5] * 2001}, "tokens"),
    ]:
        status, answer, _ = await engine.post(path, body)
        assert (status, answer["error"]["param"]) == (400, param)
        assert "2000" in answer["error"]["message"]


async def test_places_are_taken_before_prompts_are_tokenized(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(served_model.ServedModel, "prompts", None)
    status, error = await engine.refusal(prompt=["hello"] * 9)
    assert (status, error["param"]) == (400, "prompt")
    assert "9 choices" in error["message"]
