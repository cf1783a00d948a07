"""Large requests at the router: what is refused, what reaches the engines, and what they hold
meanwhile.
"""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import msgspec
import pytest

from pdlaunch.http.limits import LARGE_BODY_BYTES, SMALL_BODY_BYTES, max_engine_body_bytes
from pdlaunch.protocol.openai.requests import MAX_CHOICES
from pdlaunch.router.client_request import COMPLETIONS, read_client_request
from tests.router.conftest import SPEC, Stand, pair
from tests.router.fake_engine import FakeEngine, until
from tests.router.test_life_of_a_request import CHAT, MESSAGES, chat, completion

LARGE_MODEL_LEN = 2**22
LARGE = msgspec.structs.replace(SPEC, max_body_bytes=2**21, body_budget_bytes=2**22)


def large_pair() -> list[FakeEngine]:
    return [
        FakeEngine(f"{role}-0", role, max_model_len=LARGE_MODEL_LEN)
        for role in ("prefill", "decode")
    ]


async def post(
    stand: Stand, path: str, raw: bytes, **headers: str
) -> tuple[int, dict[str, Any], str | None]:
    headers = {"Content-Type": "application/json"} | headers
    async with stand.session.post(path, data=io.BytesIO(raw), headers=headers) as response:
        return response.status, await response.json(), response.headers.get("Retry-After")


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
async def test_bodies_of_very_many_values_reach_no_engine(stand: Stand, path: str) -> None:
    await stand.start(pair(), spec=LARGE)
    for item, number in (
        (b"[],", 200_000),
        (b'{"role":"user","content":"a"},', 30_000),
        (b'"ab",', 200_000),
    ):
        for member in (b"messages", b"resume"):
            raw = b'{"%s": [%s{}]}' % (member, item * number)
            status, answer, _ = await post(stand, path, raw)
            assert (status, answer["error"]["code"]) == (400, "too_many_values")
    assert not any(engine.seen for engine in stand.engines.values())


async def test_messages_and_prompts_reach_engines_as_they_were_written(stand: Stand) -> None:
    """Nothing is made of them here, not even of numbers that would be written otherwise."""
    await stand.start(pair())
    raw = json.dumps(chat()).replace(
        json.dumps(MESSAGES), '[{"role": "user", "content": "h\\u00e9 \\/", "x": 1e2}]'
    )
    assert (await post(stand, CHAT, raw.encode()))[0] == 200
    (seen,) = stand.engines["prefill-0"].seen
    assert seen.body["messages"] == [{"role": "user", "content": "hé /", "x": 1e2}]
    for prompt in ("a\\u00e9b", ["two", "prompts"], [[5, 6], [7]], [5, 6]):
        stand.engines["prefill-0"].seen.clear()
        assert (await stand.post(completion(prompt=prompt))).status == 200
        several = (
            prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        )
        assert sorted(
            str(seen.body["prompt"]) for seen in stand.engines["prefill-0"].seen
        ) == sorted(map(str, several))


async def test_a_body_is_held_until_its_answer(stand: Stand) -> None:
    """Another engine may be asked meanwhile."""
    await stand.start(large_pair(), spec=LARGE)
    decode = stand.engines["decode-0"]
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
        COMPLETIONS,
        raw,
        served_model_name="tiny",
        request_id="r",
        hop_id="r",
        headers={},
    )
    (prompt,) = request.prompts
    resume = {"choices": [[{"token_id": 2**31 - 1}] * max_model_len] * MAX_CHOICES, "sent": True}
    limit = max_engine_body_bytes(len(raw), max_model_len)
    assert len(raw) < len(prompt.prefill_body(knows_whole_request=True)) <= limit
    assert len(raw) < len(prompt.decode_body({"resume": resume})) <= limit
