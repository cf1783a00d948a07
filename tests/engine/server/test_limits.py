"""Where an engine says no, and how."""

from __future__ import annotations

import asyncio
import io

import pytest

from pdlaunch.config.shared_settings import LimitSettings
from pdlaunch.protocol.engine import AbortRequest, AddRequest, RequestFinished
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank, silent

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"prompt": ""}, 400, "prompt", None),
        ({"prompt": [512]}, 400, "prompt", None),
        ({"prompt": [5] * 100}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * 90, "max_tokens": 11}, 400, "max_tokens", "context_length_exceeded"),
        ({"logit_bias": {"512": 1}}, 400, "logit_bias", None),
        ({"stop_token_ids": [512]}, 400, "stop_token_ids", None),
        ({"echo": True}, 400, "echo", "unsupported_parameter"),
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


async def test_a_long_prompt_is_refused_with_both_numbers(engine: Engine):
    _, error = await engine.refusal(prompt=[5] * 123)
    assert "123" in error["message"]
    assert "100" in error["message"]


async def test_the_longest_prompt_leaves_room_for_one_token(engine: Engine, rank: FakeRank):
    await engine.complete(prompt=[5] * 99)
    assert rank.added()[0].sampling.max_tokens == 1


@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/pdlaunch/release"],
)
async def test_bodies_that_are_no_request(engine: Engine, path: str):
    for data, kind, status in [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"{}", "text/plain", 415),
    ]:
        async with engine.session.post(
            engine.url + path, data=data, headers={"Content-Type": kind}
        ) as response:
            assert response.status == status
            assert "message" in (await response.json())["error"]


async def test_a_large_body_is_a_413(make_engine):
    engine = await make_engine(limits=LimitSettings(max_body_bytes=1000))
    body = io.BytesIO(b'{"prompt": "' + b"x" * engine.service.max_body_bytes)
    async with engine.session.post(
        engine.url + "/v1/completions", data=body, headers=JSON
    ) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (
            413,
            "body_too_large",
        )


async def test_unknown_paths_and_methods_have_the_same_form(engine: Engine):
    for method, path, status in [("GET", "/nothing", 404), ("GET", "/v1/completions", 405)]:
        async with engine.session.request(method, engine.url + path) as response:
            assert response.status == status
            assert (await response.json())["error"]["message"]


async def test_a_bad_request_id_is_refused(engine: Engine):
    status, answer, _ = await engine.post(
        "/v1/completions", {"prompt": "x"}, **{"X-Request-Id": "a b"}
    )
    assert (status, answer["error"]["param"]) == (400, "X-Request-Id")


async def test_errors_echo_the_request_id(engine: Engine):
    status, _, response = await engine.post("/v1/completions", {}, **{"X-Request-Id": "abc"})
    assert (status, response.headers["X-Request-Id"]) == (400, "abc")


async def test_a_full_engine_is_a_429(make_engine, rank: FakeRank):
    engine = await make_engine(limits=LimitSettings(max_queued_requests=2))
    rank.script = silent
    running = asyncio.create_task(engine.complete(n=2, max_tokens=1))
    requests = await rank.wait_for(AddRequest, 2)
    status, answer, response = await engine.post("/v1/completions", {"prompt": "x"})
    assert (status, answer["error"]["type"], response.headers["Retry-After"]) == (
        429,
        "rate_limit_error",
        "1",
    )
    rank.script = rank.says("hello")
    for request in requests:
        for item in rank.script(request):
            await rank.say(item)
    await running
    await engine.complete(n=2)


async def test_draining_refuses_new_and_finishes_running_requests(engine: Engine, rank: FakeRank):
    rank.script = silent
    running = asyncio.create_task(engine.complete(max_tokens=1))
    (request,) = await rank.wait_for(AddRequest)
    draining = asyncio.create_task(engine.service.admission.drain(timeout_s=20))
    await asyncio.sleep(0)
    status, answer, response = await engine.post("/v1/completions", {"prompt": "x"})
    assert (status, answer["error"]["code"]) == (503, "shutting_down")
    assert "Retry-After" in response.headers
    assert not draining.done()
    await rank.say(RequestFinished(request_id=request.request_id, reason="length"))
    await running
    await draining


async def test_draining_ends_at_its_timeout(engine: Engine, rank: FakeRank):
    rank.script = silent
    running = asyncio.create_task(engine.complete(max_tokens=1))
    await rank.wait_for(AddRequest)
    await engine.service.admission.drain(timeout_s=0)
    assert engine.service.admission.in_flight == 1
    running.cancel()
    await rank.wait_for(AbortRequest)
    await asyncio.gather(running, return_exceptions=True)
