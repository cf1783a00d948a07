"""Where an engine says no, and how."""

from __future__ import annotations

import asyncio
import io

import pytest

from pdlaunch.config.shared_settings import LimitSettings
from pdlaunch.protocol.engine import AddRequest, RequestFinished
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
        ({"prompt": "a" * (2**18 + 1)}, 400, "prompt", "context_length_exceeded"),
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


async def test_the_longest_prompt_leaves_room_for_one_token(engine: Engine, rank: FakeRank):
    await engine.complete(prompt=[5] * 99)
    assert rank.added()[0].sampling.max_tokens == 1


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
