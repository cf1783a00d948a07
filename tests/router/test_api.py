"""The router's door: limits, keys, errors, the endpoints besides generation, and the official
client.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from tests.router.conftest import SPEC, Stand, pair
from tests.router.fake_engine import until
from tests.router.test_life_of_a_request import CHAT, MESSAGES, completion, expected_text

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


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"a": NaN}', b"[" * 50_000]
)
async def test_a_body_that_is_no_object_is_400(stand: Stand, raw: bytes) -> None:
    await stand.start(pair())
    async with stand.session.post("/v1/completions", data=raw, headers=JSON) as response:
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_large_body_is_413(stand: Stand, chunked: bool) -> None:
    await stand.start(pair())
    raw = json.dumps(completion(prompt="x" * SPEC.max_body_bytes)).encode()

    async def pieces() -> Any:
        for start in range(0, len(raw), 10_000):
            yield raw[start : start + 10_000]

    async with stand.session.post(
        "/v1/completions", data=pieces() if chunked else raw, headers=JSON
    ) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "body_too_large"


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


async def test_an_unknown_model_is_404(stand: Stand) -> None:
    await stand.start(pair())
    answer = await stand.post(completion(model="other"))
    assert answer.status == 404
    assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("PUT", "/nowhere", 404)],
)
async def test_unknown_paths_answer_in_the_same_form(
    stand: Stand, method: str, path: str, status: int
) -> None:
    await stand.start([])
    async with stand.session.request(method, path) as response:
        assert response.status == status
        assert path in (await response.json())["error"]["message"]
        assert response.headers["X-Request-Id"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/v1/models/tiny", "GET, HEAD"),
    ],
)
async def test_a_405_tells_what_is_allowed(
    stand: Stand, method: str, path: str, allowed: str
) -> None:
    await stand.start([])
    async with stand.session.request(method, path) as response:
        assert (response.status, response.headers["Allow"]) == (405, allowed)
        assert (await response.json())["error"]["code"] == "method_not_allowed"
    assert stand.metric('pdlaunch_router_request_errors_total{model_name="tiny",status="405"}') == 1


async def test_head_is_get_without_a_body(stand: Stand) -> None:
    await stand.start(pair())
    for starting, status in ([], 200), (["decode-0", "prefill-0"], 503):
        stand.publish(starting=starting)
        async with stand.session.head("/health") as response:
            assert response.status == status
            assert int(response.headers["Content-Length"]) > 0
            assert await response.read() == b""


async def test_more_requests_than_places_are_429(stand: Stand) -> None:
    prefill, decode = pair()
    decode.hold_after = 0
    await stand.start([prefill, decode], spec=msgspec.structs.replace(SPEC, max_queued_requests=2))
    running = [asyncio.ensure_future(stand.post(completion())) for _ in range(2)]
    await until(lambda: len(decode.seen) == 2)
    answer = await stand.post(completion())
    assert answer.status == 429
    assert answer.headers["Retry-After"] == "1"
    assert stand.router.admission.in_flight == 2
    decode.go.set()
    assert [(await request).status for request in running] == [200, 200]
    assert (await stand.post(completion())).status == 200
    assert stand.router.admission.in_flight == 0


async def test_a_draining_router_finishes_what_it_has(stand: Stand) -> None:
    prefill, decode = pair()
    decode.hold_after = 1
    await stand.start([prefill, decode])
    running = asyncio.ensure_future(stand.post(completion(stream=True)))
    await decode.holding.wait()
    assert not await stand.router.admission.drain(0.0)
    refused = await stand.post(completion())
    assert refused.status == 503
    assert int(refused.headers["Retry-After"]) > 0
    assert refused.json()["error"]["code"] == "draining"
    async with stand.session.get("/health") as response:
        assert response.status == 503
        assert (await response.json())["status"] == "draining"
    drained = asyncio.ensure_future(stand.router.admission.drain(30.0))
    decode.go.set()
    assert (await running).texts() == {0: expected_text("hello", 6)}
    assert await drained


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


async def test_tokenize_is_answered_by_any_engine(stand: Stand) -> None:
    await stand.start(pair())
    assert (await stand.post({"prompt": "x"}, path="/tokenize")).json()["tokens"] == [1, 2]
    await stand.engines["decode-0"].stop()
    assert (await stand.post({"prompt": "x"}, path="/tokenize")).json()["tokens"] == [1, 2]
    assert (await stand.post({"tokens": [1]}, path="/detokenize")).status == 404
    stand.publish(without=["prefill-0"])
    assert (await stand.post({"prompt": "x"}, path="/tokenize")).status == 503


async def test_metrics_count_requests_and_times(stand: Stand) -> None:
    await stand.start(pair())
    await stand.post(completion(n=2, stream=True))
    await stand.post(completion(model="other"))
    async with stand.session.get("/metrics") as response:
        text = await response.text()
    assert (
        'pdlaunch_router_request_success_total{finished_reason="length",model_name="tiny"} 2.0'
        in text
    )
    assert 'pdlaunch_router_request_errors_total{model_name="tiny",status="404"} 1.0' in text
    assert 'pdlaunch_router_generation_tokens_total{model_name="tiny"} 12.0' in text
    assert 'pdlaunch_router_time_to_first_token_seconds_count{model_name="tiny"} 1.0' in text
    assert 'pdlaunch_router_inter_token_latency_seconds_count{model_name="tiny"} 10.0' in text
    assert "pdlaunch_router_engines_ready 2.0" in text
    assert 'pdlaunch_router_engines{state="ready"} 2.0' in text
    assert 'pdlaunch_router_engines{state="failed"} 0.0' in text
    assert "pdlaunch_router_requests_in_flight 0.0" in text


async def test_chat_goes_to_chat(stand: Stand) -> None:
    await stand.start(pair())
    await stand.post({"messages": MESSAGES}, path=CHAT)
    assert [seen.path for engine in stand.engines.values() for seen in engine.seen] == [CHAT, CHAT]
