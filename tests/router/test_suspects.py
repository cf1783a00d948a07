"""Requests that engines die of: each is tried once more, marked, and then no more."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from pdlaunch.http.headers import ORIGIN_HEADER, format_origin, read_origin
from pdlaunch.protocol.control import Suspects
from tests.http.loop_clock import pass_time
from tests.router.conftest import Stand, pairs
from tests.router.fake_engine import FakeEngine
from tests.router.fake_generation import Seen
from tests.router.test_life_of_a_request import completion, expected_text

RESTARTING = {
    "message": "the engine is restarting",
    "type": "service_unavailable_error",
    "param": None,
    "code": "engine_restarting",
}


def die_of_requests(stand: Stand, engine: FakeEngine, *, news_after_s: float = 0.0) -> None:
    """Its rank dies of whatever it gets. The registry and the suspects are told ``news_after_s``
    later than the server.
    """

    async def die(request: web.Request, seen: Seen) -> web.StreamResponse:
        tell_of_death(stand, engine, seen, news_after_s)
        return web.json_response({"error": RESTARTING}, status=503)

    engine._answer = die  # type: ignore[method-assign]


def tell_of_death(stand: Stand, engine: FakeEngine, seen: Seen, after_s: float = 0.0) -> None:
    origin, is_suspect = read_origin(seen.headers[ORIGIN_HEADER])
    assert origin

    def tell() -> None:
        stand.state.suspects.take(
            Suspects(origins=[origin, 12345], repeated=[origin] if is_suspect else [])
        )
        stand.publish(starting=[engine.name])

    if after_s:
        loop = asyncio.get_running_loop()
        loop.call_later(0.05, pass_time, after_s - 0.05)
        loop.call_later(0.05 + after_s, tell)
    else:
        tell()


def marks(stand: Stand) -> list[bool]:
    """Of all that engines have seen: whether it was marked as a suspect."""
    return [
        read_origin(seen.headers[ORIGIN_HEADER])[1]
        for engine in stand.engines.values()
        for seen in engine.seen
    ]


@pytest.mark.parametrize("news_after_s", [0.0, 0.1, 4.0])
@pytest.mark.parametrize("stream", [False, True])
async def test_request_that_kills_fails_after_two_deaths(
    stand: Stand, stream: bool, news_after_s: float
) -> None:
    await stand.start(pairs(2))
    for engine in stand.engines.values():
        die_of_requests(stand, engine, news_after_s=news_after_s)
    answer = await stand.post(completion(stream=stream))
    assert answer.status == 500
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("request_kills_engine", "server_error")
    assert "twice" in error["message"]
    assert answer.headers["X-Should-Retry"] == "false", "OpenAI's clients would send it again"
    assert sorted(marks(stand)) == [False, True]


@pytest.mark.parametrize("stream", [False, True])
async def test_innocent_request_is_answered_by_the_next_engine_which_is_told(
    stand: Stand, stream: bool
) -> None:
    await stand.start(pairs(2))
    die_of_requests(stand, stand.engines["prefill-0"], news_after_s=0.1)
    answer = await stand.post(completion(stream=stream))
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert sorted(marks(stand)) == [False, True, True], "prefill, prefill again, decode"
    for engine in stand.engines.values():
        engine.seen.clear()
    await stand.post(completion())
    assert True not in marks(stand), "the next request has nothing to do with it"
    assert stand.state.suspects._num_deaths == {}


@pytest.mark.parametrize("header", [None, "", "0", "-1", "x", "1;other", str(2**63), "1" * 30])
def test_headers_that_say_nothing(header: str | None) -> None:
    assert read_origin(header) == (0, False)


def test_headers_read_as_they_are_written() -> None:
    assert read_origin(format_origin(2**63 - 1)) == (2**63 - 1, False)
    assert read_origin(format_origin(5, is_suspect=True)) == (5, True)
