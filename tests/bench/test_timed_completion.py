"""Tokens get the time at which the piece of the stream that tells of them was read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import aiohttp
import pytest

from pdlaunch.bench.serve.timed_completion import TimedCompletion, complete, read_stream
from tests.bench.fake_openai import FakeOpenAI, event

USAGE = {"completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 7}}
DONE = b"data: [DONE]\n\n"


def token(*token_ids: int) -> bytes:
    return event(
        choices=[{"index": 0, "text": "a", "token_ids": token_ids, "prompt_token_ids": [1, 2, 3]}],
        usage=None,
    )


async def read(*timed_pieces: tuple[float, bytes]) -> TimedCompletion:
    async def pieces() -> AsyncIterator[bytes]:
        for _, piece in timed_pieces:
            yield piece

    times_s = iter([time_s for time_s, _ in timed_pieces])
    completion = TimedCompletion(start_at=10.0)
    await read_stream(pieces(), completion, lambda: next(times_s))
    return completion


async def test_the_first_gap_is_none_of_the_inter_token_times() -> None:
    found = await read(
        (11.0, token(4)),
        (15.0, token(5)),
        (15.5, token(6)),
        (16.25, token(7)),
        (17.0, event(choices=[], usage=USAGE) + DONE),
    )
    assert found.error is None
    assert (found.ttft_s, found.all_gaps_s[0], found.inter_token_s) == (1.0, 4.0, [0.5, 0.75])
    assert (found.token_ids, found.num_tokens, found.num_cached_tokens) == ([4, 5, 6, 7], 3, 7)


async def test_tokens_of_one_read_came_at_the_same_time() -> None:
    found = await read(
        (11.0, token(4)), (12.0, token(5) + token(6)), (14.0, token(7, 8)), (15.0, DONE)
    )
    assert found.tokens_at == [11.0, 12.0, 12.0, 14.0, 14.0]


async def test_a_token_came_when_its_last_byte_was_read() -> None:
    whole = token(4) + token(5)
    for cut in range(1, len(whole)):
        found = await read((11.0, whole[:cut]), (12.0, whole[cut:]), (13.0, DONE))
        assert found.token_ids == [4, 5]
        # A line is whole with its end.
        expected = [11.0 if cut >= end else 12.0 for end in (len(token(4)) - 1, len(whole) - 1)]
        assert found.tokens_at == expected


async def test_chunks_of_servers_that_do_not_tell_token_ids_are_tokens() -> None:
    found = await read(
        (11.0, event(choices=[{"index": 0, "text": "a"}])),
        (12.0, event(choices=[{"text": "b"}]) + DONE),
    )
    assert found.tokens_at == [11.0, 12.0]
    assert found.token_ids == []


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([token(4)], "the stream ended without [DONE]"),
        ([token(4), event(error={"message": "the engine died"})], "in the stream: the engine died"),
        ([token(4), event(error="died"), DONE], "in the stream: died"),
    ],
)
async def test_streams_that_do_not_end_well(pieces: Iterable[bytes], error: str) -> None:
    assert (await read(*((11.0, piece) for piece in pieces))).error == error


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (
            429,
            b'{"error": {"message": "too many requests wait", "code": null}}',
            "HTTP 429: too many requests wait",
        ),
        (503, b'{"detail": "starting"}', "HTTP 503: {'detail': 'starting'}"),
        (502, b"<html>", "HTTP 502: <html>"),
        (500, b"", "HTTP 500: Internal Server Error"),
    ],
)
async def test_refusals_are_told_as_they_were_worded(status: int, body: bytes, error: str) -> None:
    server = FakeOpenAI()
    server.refusals = [(status, body)]
    assert await ask(server) == error


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (b"", "the stream ended without [DONE]"),
        (b"data: {no json\n\n", "an event that is not of the OpenAI form: "),
        (b'data: {"choices": 3}\n\n', "an event that is not of the OpenAI form: "),
        (event(choices=[{"token_ids": [1]}]) + DONE, "0 tokens instead of 3"),
        (event(choices=[], usage={"completion_tokens": 3}) + DONE, "no chunk with a token"),
    ],
)
async def test_answers_that_are_none(broken: bytes, error: str) -> None:
    server = FakeOpenAI()
    server.broken = broken
    assert str(await ask(server)).startswith(error)


async def ask(server: FakeOpenAI) -> str | None:
    runner = await server.start()
    try:
        async with aiohttp.ClientSession(server.url) as session:
            return (await complete(session, "made-up", [1, 2], 3)).error
    finally:
        await runner.cleanup()
