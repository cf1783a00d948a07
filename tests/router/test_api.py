"""The router's door: limits, keys, errors, fields, large bodies, and endpoints besides generation.

The page is there without a key and holds no data.
"""

import asyncio
import io
import json
import re
from importlib import resources
from typing import Any

import pytest

from pdlaunch.http.headers import IGNORED_FIELDS_HEADER
from pdlaunch.http.limits import LARGE_BODY_BYTES, SMALL_BODY_BYTES, engine_bodies
from pdlaunch.protocol.control import MODEL_CHANGED, Registry
from pdlaunch.protocol.openai.requests import MAX_CHOICES
from pdlaunch.router.app import PAGE_PATHS
from pdlaunch.router.client_request import COMPLETIONS, read_client_request
from tests.router.conftest import Stand, client_key, pair
from tests.router.fake_engine import until
from tests.router.test_life_of_a_request import CHAT, MESSAGES, chat, completion


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
        ({"prompt_token_ids": [1]}, "prompt_token_ids"),
        ({"prompt": ["x"] * 17}, "prompt"),
        ({"prompt": ["x"] * 5000}, "prompt"),
    ],
)
async def test_fields_that_the_router_acts_on_are_checked_by_it(
    stand: Stand, fields: dict[str, Any], param: str
) -> None:
    await stand.start_pair()
    answer = await stand.post(completion(**fields))
    assert answer.status == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert param.split(".")[0] in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not any(engine.seen for engine in stand.engines.values())


async def test_the_api_key_is_asked_for(stand: Stand) -> None:
    await stand.start_pair(keys=(client_key("secret"),))
    for key in ("", "Bearer wrong", "secret", "Bearer sécret"):
        headers = {"Authorization": key} if key else {}
        answer = await stand.post(completion(), headers=headers)
        assert answer.status == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert b"secret" not in answer.raw
    right = {"Authorization": "Bearer secret"}
    assert (await stand.post(completion(), headers=right)).status == 200
    assert stand.engines["prefill-0"].seen[0].headers["Authorization"] == "Bearer launch-token"
    for path, status in (("/v1/models", 401), ("/health", 200), ("/metrics", 200)):
        async with stand.session.get(path) as response:
            assert response.status == status


async def test_health_tells_the_engines_states(stand: Stand) -> None:
    await stand.start_pair()
    for starting, status, word in (
        ([], 200, "ok"),
        (["decode-0"], 200, "ok"),
        (["decode-0", "prefill-0"], 503, "unavailable"),
    ):
        stand.publish(dict.fromkeys(starting, "starting"))
        body = await stand.get("/health", status=status)
        assert body["status"] == word
        assert body["engines"] == {
            name: "starting" if name in starting else "ready" for name in ("decode-0", "prefill-0")
        }
        assert "model_changed" not in body
    entries = stand.engines["decode-0"].entries("failed")
    entries[0].reason = f"decode-0 died: {MODEL_CHANGED}: model.safetensors"
    stand.state.update(Registry(version=99, entries=entries))
    assert (await stand.get("/health", status=503))["model_changed"] == ["decode-0"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 4])
async def test_what_engines_ignore_is_named_in_the_answer(
    stand: Stand, stream: bool, max_tokens: int
) -> None:
    engines = await stand.start_pair()
    body = completion(stream=stream, max_tokens=max_tokens)
    assert IGNORED_FIELDS_HEADER not in (await stand.post(body)).headers
    for engine in engines:
        engine.headers[IGNORED_FIELDS_HEADER] = "no_stop_trim, messages.x"
    answer = await stand.post(body | {"no_stop_trim": False})
    assert answer.status == 200
    assert answer.headers[IGNORED_FIELDS_HEADER] == "no_stop_trim, messages.x"
    assert all("no_stop_trim" in seen.body for engine in engines for seen in engine.seen[-1:])


@pytest.mark.parametrize("path", PAGE_PATHS)
async def test_it_needs_no_key_and_tells_nothing(stand: Stand, path: str) -> None:
    await stand.start_pair(keys=(client_key("the-key"),))
    async with stand.session.get(path) as response:
        text = await response.text()
        assert response.status == 200
        policy = response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        tag = response.headers["ETag"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'" in policy
    assert "unsafe" not in policy
    for told in ("prefill-0", "tiny", "the-key", stand.engines["decode-0"].url):
        assert told not in text
    async with stand.session.get(path, headers={"If-None-Match": tag}) as response:
        assert (response.status, await response.read()) == (304, b"")
    async with stand.session.get("/pdlaunch/status") as response:
        assert response.status == 401


def test_no_text_becomes_markup() -> None:
    ways = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=|style=|javascript:"
    )
    for file in (resources.files("pdlaunch.router") / "static").iterdir():
        assert not re.search(ways, file.read_text()), file.name


LARGE = {"max_body_bytes": 2**21}


async def post(stand: Stand, path: str, raw: bytes) -> tuple[int, dict[str, Any]]:
    headers = {"Content-Type": "application/json"}
    async with stand.session.post(path, data=io.BytesIO(raw), headers=headers) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
async def test_bodies_of_very_many_values_reach_no_engine(stand: Stand, path: str) -> None:
    await stand.start_pair(**LARGE)
    for item, number in (
        (b"[],", 200_000),
        (b'{"role":"user","content":"a"},', 30_000),
        (b'"ab",', 200_000),
    ):
        for member in (b"messages", b"resume"):
            raw = b'{"%s": [%s{}]}' % (member, item * number)
            status, answer = await post(stand, path, raw)
            assert (status, answer["error"]["code"]) == (400, "too_many_values")
    assert not any(engine.seen for engine in stand.engines.values())


async def test_messages_and_prompts_reach_engines_as_they_were_written(stand: Stand) -> None:
    """Nothing is made of them here, not even of numbers that would be written otherwise."""
    await stand.start_pair()
    raw = json.dumps(chat()).replace(
        json.dumps(MESSAGES), '[{"role": "user", "content": "h\\u00e9 \\/", "x": 1e2}]'
    )
    assert (await post(stand, CHAT, raw.encode()))[0] == 200
    (seen,) = stand.engines["prefill-0"].seen
    assert seen.body["messages"] == [{"role": "user", "content": "hé /", "x": 1e2}]
    text, texts, ids = "a\\u00e9b", ["two", "prompts"], [[5, 6], [7]]
    for prompt, prompts in ((text, [text]), (texts, texts), (ids, ids), ([5, 6], [[5, 6]])):
        stand.engines["prefill-0"].seen.clear()
        assert (await stand.post(completion(prompt=prompt))).status == 200
        told = [seen.body["prompt"] for seen in stand.engines["prefill-0"].seen]
        assert sorted(told) == sorted(prompts)


async def test_a_body_is_held_until_its_answer(stand: Stand) -> None:
    """Another engine may be asked meanwhile."""
    prefill, decode = engines = pair()
    prefill.max_model_len = decode.max_model_len = 2**22
    await stand.start(engines, **LARGE)
    decode.hold_after = 1
    body = completion(prompt="x" * SMALL_BODY_BYTES)
    asked = asyncio.create_task(stand.session.post("/v1/completions", json=body))
    await decode.holding.wait()
    held_bytes = stand.router._bodies.held_bytes
    assert SMALL_BODY_BYTES < held_bytes < 2 * SMALL_BODY_BYTES
    asked.cancel()
    await until(lambda: stand.router._bodies.held_bytes == 0)


@pytest.mark.parametrize("text", ["x", "é", "\\n", '\\"', "\\u00e9", " "])
def test_engines_take_what_the_router_makes_of_the_longest_body(text: str) -> None:
    max_model_len = 100
    head, tail = f'{{"n": {MAX_CHOICES}, "prompt": "', '"}'
    number = (LARGE_BODY_BYTES - len(head) - len(tail)) // len(text.encode())
    raw = (head + text * number + tail).encode()
    request = read_client_request(
        COMPLETIONS, raw, served_model_name="tiny", request_id="r", hop_id="r", headers={}
    )
    (prompt,) = request.prompts
    resume = {"choices": [[{"token_id": 2**31 - 1}] * max_model_len] * MAX_CHOICES, "sent": True}
    limit = engine_bodies(len(raw), max_model_len).max_body_bytes
    assert len(raw) < len(prompt.prefill_body(knows_whole_request=True)) <= limit
    assert len(raw) < len(prompt.decode_body({"resume": resume})) <= limit
