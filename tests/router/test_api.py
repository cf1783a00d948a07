"""The router's door: limits, keys, errors, fields, the endpoints besides generation."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pdlaunch.http.headers import IGNORED_FIELDS_HEADER
from tests.router.conftest import SPEC, Stand, pair
from tests.router.test_life_of_a_request import completion

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"kv_transfer_params": {"do_remote_decode": True}}, "kv_transfer_params"),
        ({"resume": {}}, "resume"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"seed": "x"}, "seed"),
        ({"return_token_ids": "yes"}, "return_token_ids"),
        ({"prompt": ["x"] * 17}, "prompt"),
        ({"prompt": ["x"] * 5000}, "prompt"),
    ],
)
async def test_fields_that_the_router_acts_on_are_checked_by_it(
    stand: Stand, fields: dict[str, Any], param: str
) -> None:
    await stand.start(pair())
    answer = await stand.post(completion(**fields))
    assert answer.status == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert param.split(".")[0] in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not any(engine.seen for engine in stand.engines.values())


async def test_the_api_key_is_asked_for(stand: Stand) -> None:
    await stand.start(pair(), spec=msgspec.structs.replace(SPEC, api_key="secret"))
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Bearer sécret"},
    ):
        answer = await stand.post(completion(), headers=headers)
        assert answer.status == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert b"secret" not in answer.raw
    assert (
        await stand.post(completion(), headers={"Authorization": "Bearer secret"})
    ).status == 200
    assert stand.engines["prefill-0"].seen[0].headers["Authorization"] == "Bearer launch-token"
    async with stand.session.get("/v1/models") as response:
        assert response.status == 401
    for path in ("/health", "/metrics"):
        async with stand.session.get(path) as response:
            assert response.status == 200


async def test_health_tells_the_engines_states(stand: Stand) -> None:
    await stand.start(pair())
    for starting, status, word in (
        ([], 200, "ok"),
        (["decode-0"], 200, "ok"),
        (["decode-0", "prefill-0"], 503, "unavailable"),
    ):
        stand.publish(starting=starting)
        async with stand.session.get("/health") as response:
            body = await response.json()
        assert (response.status, body["status"]) == (status, word)
        assert body["engines"] == {
            name: "starting" if name in starting else "ready" for name in ("decode-0", "prefill-0")
        }


async def test_models_tell_the_length(stand: Stand) -> None:
    await stand.start(pair())
    async with stand.session.get("/v1/models") as response:
        (card,) = (await response.json())["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 4096)
    async with stand.session.get("/v1/models/tiny") as response:
        assert await response.json() == card
    async with stand.session.get("/v1/models/other") as response:
        assert response.status == 404


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 4])
async def test_what_engines_ignore_is_named_in_the_answer(
    stand: Stand, stream: bool, max_tokens: int
) -> None:
    engines = pair()
    await stand.start(engines)
    body = completion(stream=stream, max_tokens=max_tokens)
    assert IGNORED_FIELDS_HEADER not in (await stand.post(body)).headers
    for engine in engines:
        engine.ignored_fields = "no_stop_trim, messages.x"
    answer = await stand.post(body | {"no_stop_trim": False})
    assert answer.status == 200
    assert answer.headers[IGNORED_FIELDS_HEADER] == "no_stop_trim, messages.x"
    assert all("no_stop_trim" in seen.body for engine in engines for seen in engine.seen[-1:])
