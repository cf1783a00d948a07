"""Large inputs at one engine: what is refused, that others are served meanwhile, and that nothing
is left of them.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pdlaunch.config.shared_settings import LimitSettings
from pdlaunch.engine.server import served_model
from pdlaunch.engine.server.engine_service import EngineService
from pdlaunch.http.limits import SMALL_BODY_BYTES
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank

JSON = {"Content-Type": "application/json"}
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


async def post(engine: Engine, path: str, raw: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    async with engine.session.post(
        engine.url + path, data=io.BytesIO(raw), headers=JSON | headers
    ) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("path", PATHS)
async def test_bodies_of_very_many_values_are_refused_before_they_are_parsed(
    engine: Engine, rank: FakeRank, path: str
):
    for item, number in ((b"[],", 200_000), (b'{"role":"user","content":"a"},', 30_000)):
        status, answer = await post(engine, path, b'{"messages": [' + item * number + b"{}]}")
        assert (status, answer["error"]["code"]) == (400, "too_many_values")
    assert engine.service.bodies.held_bytes == engine.service.admission.in_flight == 0
    assert rank.added() == []


async def test_tokenize_and_detokenize_are_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served_model, "MIN_TEXT_CHARS", 2000)
    monkeypatch.setattr(served_model, "MIN_TOKEN_IDS", 2000)
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


async def test_tokenize_takes_a_place_of_the_engine(make_engine: Callable[..., Any]):
    engine = await make_engine(limits=LimitSettings(max_queued_requests=1))
    with engine.service.admission.admit():
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
            status, answer, response = await engine.post(path, body)
            assert (status, answer["error"]["code"], response.headers["Retry-After"]) == (
                429,
                "too_many_requests",
                "1",
            )
    assert (await engine.post("/tokenize", {"prompt": "a"}))[0] == 200


async def test_an_engine_that_sleeps_tokenizes(engine: Engine):
    engine.service.sleep.settle(["kv_cache"])
    assert (await engine.post("/tokenize", {"prompt": "a"}))[0] == 200


class HeldThreads:
    """Keeps everything that is worked at in threads from going on."""

    def __init__(self, service: EngineService, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.num_waiting = 0
        run = service.inputs.run

        async def held(is_large: bool, work: Callable[[], Any]) -> Any:
            self.num_waiting += is_large
            return await run(is_large, (lambda: self.go.wait() and work()) if is_large else work)

        monkeypatch.setattr(service.inputs, "run", held)

    async def wait_for(self, number: int) -> None:
        while self.num_waiting < number:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.005)


async def test_small_requests_are_served_while_large_ones_are_worked_at(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    threads = HeldThreads(engine.service, monkeypatch)
    large = [asyncio.create_task(engine.refusal(prompt="hello " * 20_000)) for _ in range(4)]
    await threads.wait_for(4)
    await engine.complete()
    assert not any(task.done() for task in large)
    threads.go.set()
    for status, error in await asyncio.gather(*large):
        assert (status, error["code"]) == (400, "context_length_exceeded")


async def test_bodies_hold_room_until_they_are_token_ids(
    make_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    engine = await make_engine(limits=LimitSettings(max_body_bytes=1000, max_queued_requests=100))
    threads = HeldThreads(engine.service, monkeypatch)
    body = {"prompt": "hello " * (SMALL_BODY_BYTES // 5)}
    num_fitting = engine.service.bodies.max_bytes * 3 // 4 // (len(body["prompt"]) + 20)
    large = [asyncio.create_task(engine.refusal(**body)) for _ in range(num_fitting)]
    await threads.wait_for(num_fitting)
    status, answer, response = await engine.post("/v1/completions", body)
    assert (status, answer["error"]["code"], response.headers["Retry-After"]) == (
        503,
        "too_many_bytes_in_flight",
        "1",
    )
    await engine.complete()
    threads.go.set()
    await asyncio.gather(*large)
    assert engine.service.bodies.held_bytes == 0


async def test_places_are_taken_before_prompts_are_tokenized(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pdlaunch.engine.server.served_model.ServedModel.prompts", None)
    status, error = await engine.refusal(prompt=["hello"] * 9)
    assert (status, error["param"]) == (400, "prompt")
    assert "9 choices" in error["message"]
