"""Where an engine says no, and how: keys, bodies, fields, limits; and what large inputs cost."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from pdlaunch.config.shared_settings import LimitSettings
from pdlaunch.engine.server import engine_service, served_model
from pdlaunch.engine.server.lifecycle import OPEN_PATHS, make_app
from pdlaunch.http.headers import IGNORED_FIELDS_HEADER
from pdlaunch.protocol.engine import AddRequest
from tests.engine.server.conftest import TOKEN, Engine
from tests.engine.server.fake_rank import FakeRank, silent

JSON = {"Content-Type": "application/json"}
HELLO = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": HELLO},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
MakeEngine = Callable[..., Any]


async def sent(
    engine: Engine, path: str, body: bytes | dict[str, Any], **headers: str
) -> tuple[int, aiohttp.ClientResponse, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    # A file: aiohttp warns of long bodies that are bytes.
    async with engine.session.post(
        engine.url + path, data=io.BytesIO(raw), headers=JSON | headers
    ) as response:
        return response.status, response, await response.json()


# The door


def routes(engine: Engine) -> list[tuple[str, str]]:
    found = make_app(engine.service, keys=[]).router.routes()
    return [
        (route.method, route.resource.canonical.replace("{name}", "tiny"))
        for route in found
        if route.resource is not None and route.method != "*"
    ]


async def test_every_route_but_health_asks_for_a_key(engine: Engine, rank: FakeRank):
    found = routes(engine)
    assert {path for _, path in found} > {*BODIES, "/health", "/metrics", "/sleep", "/wake_up"}
    for method, path in [*found, ("GET", "/nothing")]:
        for key in ("", "Bearer wrong", f"Basic {TOKEN}", "Bearer ", TOKEN):
            async with engine.session.request(
                method, engine.url + path, headers={"Authorization": key}
            ) as response:
                wanted = 200 if path in OPEN_PATHS else 401
                assert response.status == wanted, (method, path, key)
    assert rank.added() == []


# Fields


@pytest.mark.parametrize("path", BODIES)
async def test_unknown_fields_are_ignored_and_named(engine: Engine, path: str) -> None:
    body = BODIES[path] | {"max_tokens": 2} if path.startswith("/v1") else BODIES[path]
    status, response, _ = await sent(engine, path, body)
    assert (status, IGNORED_FIELDS_HEADER in response.headers) == (200, False)
    status, response, _ = await sent(engine, path, body | {"no_stop_trim": 1, "nonsense": 2})
    assert (status, response.headers[IGNORED_FIELDS_HEADER]) == (200, "no_stop_trim, nonsense")


async def test_a_field_that_vllm_has_names_vllm(engine: Engine) -> None:
    for name, value, has in (("prompt_embeds", "x", True), ("best_of", 3, False)):
        status, _, answer = await sent(engine, "/v1/completions", {"prompt": "x", name: value})
        assert (status, answer["error"]["param"]) == (400, name)
        assert ("engines of vLLM have it: --engine vllm" in answer["error"]["message"]) == has


async def test_a_hostile_name_cannot_add_a_header(engine: Engine) -> None:
    names = ["x\r\nX-Evil: 1", "\n2026 ERROR forged", "é" * 10, "x" * 2**20]
    body = {"prompt": "x"} | dict.fromkeys(names, 1)
    status, response, _ = await sent(engine, "/v1/completions", body)
    assert status == 200
    assert not {"X-Evil", IGNORED_FIELDS_HEADER} & set(response.headers)


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


# Limits


async def test_a_full_engine_is_a_429(make_engine: MakeEngine, rank: FakeRank):
    engine = await make_engine(limits=LimitSettings(max_queued_requests=2))
    rank.script = silent
    running = asyncio.create_task(engine.complete(n=2, max_tokens=1))
    requests = await rank.wait_for(AddRequest, 2)
    for path, body in BODIES.items():
        status, response, answer = await sent(engine, path, body)
        assert (status, answer["error"]["code"]) == (429, "too_many_requests")
        assert response.headers["Retry-After"] == "1"
    rank.script = rank.says("hello")
    for request in requests:
        for item in rank.script(request):
            await rank.say(item)
    await running
    await engine.complete(n=2)


async def test_too_many_grammars_that_wait_to_be_compiled_are_a_429(
    engine: Engine, rank: FakeRank, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_service, "MAX_NEW_GRAMMARS", 2)
    rank.script = silent
    running = [
        asyncio.create_task(engine.complete(max_tokens=2, guided_regex=regex))
        for regex in ("a+", "b+", "b+")
    ]
    requests = await rank.wait_for(AddRequest, 3)
    status, error = await engine.refusal(guided_regex="c+")
    assert (status, error["code"]) == (429, "too_many_grammars")
    rank.script = rank.says("a")
    first, *others = sorted(requests, key=lambda request: "a+" not in request.sampling.grammar)
    await rank.say(*rank.script(first))
    await running[0]
    await engine.complete(max_tokens=2, guided_regex="c+")
    await rank.say(*(item for request in others for item in rank.script(request)))
    await asyncio.gather(*running)


async def test_a_grammar_is_no_longer_counted_once_a_token_has_come(
    engine: Engine, rank: FakeRank, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_service, "MAX_NEW_GRAMMARS", 1)
    rank.script = silent
    body = {"prompt": "x", "guided_regex": "a+", "max_tokens": 2, "stream": True}
    running = asyncio.ensure_future(engine.session.post(engine.url + "/v1/completions", json=body))
    (request,) = await rank.wait_for(AddRequest)
    first, last = rank.says("a")(request)
    await rank.say(first)
    async with await running as stream:
        rank.script = rank.says("b")
        await engine.complete(max_tokens=2, guided_regex="b+")
        await rank.say(last)
        assert b"[DONE]" in await stream.read()


@pytest.mark.parametrize("path", BODIES)
async def test_bodies_of_very_many_values_are_refused_before_they_are_parsed(
    engine: Engine, rank: FakeRank, path: str
):
    for item, number in ((b"[],", 200_000), (b'{"role":"user","content":"a"},', 30_000)):
        body = b'{"messages": [' + item * number + b"{}]}"
        status, _, answer = await sent(engine, path, body)
        assert (status, answer["error"]["code"]) == (400, "too_many_values")
    assert engine.service.bodies.held_bytes == engine.service.admission.in_flight == 0
    assert rank.added() == []


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
