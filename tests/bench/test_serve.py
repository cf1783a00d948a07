"""The benchmarks of a deployment run against a made-up one; its times are not looked at."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest

from pdlaunch.bench.serve.loads import BenchOptions
from pdlaunch.bench.serve.rows import BenchRow
from pdlaunch.bench.serve.sweep import (
    MultiTurnOptions,
    MultiTurnReport,
    bench_multi_turn,
    bench_serve,
)
from pdlaunch.errors import PdlaunchError
from tests.bench.fake_openai import FakeOpenAI

CHATS = {
    "num_conversations": 3,
    "num_turns": 3,
    "first_tokens": 10,
    "turn_tokens": 4,
    "output_tokens": 5,
    "seed": 1,
}


@asynccontextmanager
async def serving(server: FakeOpenAI) -> AsyncIterator[str]:
    runner = await server.start()
    try:
        yield server.url
    finally:
        await runner.cleanup()


async def bench(server: FakeOpenAI, **options: Any) -> list[BenchRow]:
    async with serving(server) as url:
        runs = bench_serve(BenchOptions(url=url, **options), lambda _: None)
        return [run.row async for run in runs]


async def chat(server: FakeOpenAI, **options: Any) -> MultiTurnReport:
    async with serving(server) as url:
        return await bench_multi_turn(
            MultiTurnOptions(url=url, **(CHATS | options)), lambda _: None
        )


async def test_rows_by_length_and_concurrency() -> None:
    server = FakeOpenAI()
    rows = await bench(
        server,
        input_tokens=(5, 20),
        output_tokens=3,
        concurrencies=(1, 2),
        num_requests=4,
        max_token_id=102,
    )
    assert [(row.input_tokens, row.concurrency) for row in rows] == [
        (5, 1),
        (5, 2),
        (20, 1),
        (20, 2),
    ]
    assert all((row.num_requests, row.num_errors, row.errors) == (4, 0, []) for row in rows)
    assert [len(prompt) for prompt in server.prompts] == [5, 20, *[5] * 8, *[20] * 8]
    assert {token_id for prompt in server.prompts for token_id in prompt} == {100, 101}
    assert server.most_open == 2


async def test_the_engines_counters_say_what_was_pulled() -> None:
    server = FakeOpenAI()
    # When the load is over, two of its four pulls are not counted yet.
    server.pages = [page(1, 100.0, 1.0), page(3, 700.0, 2.0), page(5, 4e6 + 100.0, 2.0)]
    (row,) = await bench(server, output_tokens=2, concurrencies=(2,), num_requests=4)
    assert (row.kv_megabytes_mean, row.pull_ms_mean) == (1.0, 250.0)


def page(pulls: int, num_bytes: float, seconds: float) -> str:
    counters = {
        "kv_transfers": pulls,
        "kv_transfer_bytes": num_bytes,
        "kv_transfer_seconds": seconds,
    }
    lines = [
        f"# TYPE pdlaunch_{name}_total counter\n"
        f'pdlaunch_{name}_total{{role="decode"}} {counters[name]}'
        for name in counters
    ]
    return "\n".join(lines) + "\n"


async def test_refused_requests_are_counted_with_their_reasons() -> None:
    server = FakeOpenAI()
    async with serving(server) as url:
        rows = bench_serve(
            BenchOptions(url=url, concurrencies=(1,), num_requests=5), lambda text: refuse(text)
        )

        def refuse(text: str) -> None:
            # Only when the warm-up is over.
            if text == "prompts of 128 tokens, 1 at once":
                server.refusals = [(429, b'{"error": {"message": "full"}}')] * 2 + [
                    (503, b'{"error": {"message": "starting"}}')
                ]

        row = (await anext(rows)).row
    assert (row.num_requests, row.num_errors) == (5, 3)
    assert row.errors == ["2 x HTTP 429: full", "1 x HTTP 503: starting"]


async def test_a_refused_warm_up_ends_it() -> None:
    server = FakeOpenAI()
    server.refusals = [(400, b'{"error": {"message": "token id 29999 is none"}}')]
    with pytest.raises(
        PdlaunchError,
        match=r"does not take a request of 128 prompt tokens: HTTP 400: token id 29999 is none",
    ):
        await bench(server)


@pytest.mark.parametrize("kind", [bench, chat])
async def test_a_context_that_is_too_long_is_told_before_anything_is_sent(kind: Any) -> None:
    server = FakeOpenAI()
    server.max_model_len = 30
    lengths: dict[str, Any] = {"input_tokens": (8, 29), "output_tokens": 2} if kind is bench else {}
    with pytest.raises(
        PdlaunchError,
        match=(
            r"a prompt of 2[89] tokens and . tokens of output .* "
            r"max_model_len 30: .*--max-model-len"
        ),
    ):
        await kind(server, **lengths)
    assert server.prompts == []


@pytest.mark.parametrize("answer", [{}, {"data": []}, {"data": [{}]}, {"data": ["a"]}, [], 3])
async def test_what_has_no_models_is_no_deployment(answer: Any) -> None:
    server = FakeOpenAI()
    server.models = answer
    with pytest.raises(PdlaunchError, match="with no list of models"):
        await bench(server)


async def test_every_turn_sends_all_that_was_said() -> None:
    server = FakeOpenAI()
    report = await chat(server)
    turns = [server.prompts[1 + 3 * turn : 4 + 3 * turn] for turn in range(3)]
    assert [[len(prompt) for prompt in turn] for turn in turns] == [[10] * 3, [19] * 3, [28] * 3]
    for early, late in pairwise(turns):
        begun = {tuple(prompt + server.answer_to(prompt, 5)) for prompt in early}
        assert {tuple(prompt[: len(prompt) - 4]) for prompt in late} == begun
        assert len(begun) == 3
    assert report.working_set_tokens == 3 * 33
    assert [
        (row.turn, row.input_tokens, row.num_requests, row.num_errors) for row in report.turns
    ] == [(1, 10, 3, 0), (2, 19, 3, 0), (3, 28, 3, 0)]
    assert [row.cached_share for row in report.turns] == [0.5, 0.474, 0.5]
    assert report.tiers == []


async def test_a_conversation_ends_with_its_first_error() -> None:
    server = FakeOpenAI()
    async with serving(server) as url:

        def refuse(turn: str) -> None:
            server.refusals = [(503, b"gone")] if turn == "turn 2 of 3" else []

        report = await bench_multi_turn(MultiTurnOptions(url=url, concurrency=1, **CHATS), refuse)
    assert [(row.num_requests, row.num_errors, row.errors) for row in report.turns] == [
        (3, 0, []),
        (3, 1, ["1 x HTTP 503: gone"]),
        (2, 0, []),
    ]


async def test_answers_without_token_ids_cannot_be_continued() -> None:
    server = FakeOpenAI()
    server.tells_token_ids = False
    (row,) = (await chat(server)).turns
    assert row.num_errors == 3
    assert "return_token_ids" in row.errors[0]
