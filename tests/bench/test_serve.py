"""``bench serve`` against a made-up deployment: what is sent, and which figures come of it."""

import json
import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdlaunch.bench.serve import (
    HASHED_TOKENS,
    BenchLoad,
    BenchOptions,
    BenchRow,
    BenchRun,
    TraceRequest,
    arrival_times,
    bench_serve,
    quantile_ms,
    read_trace_file,
    summarise,
)
from pdlaunch.bench.timed_completion import Goals, TimedCompletion, read_goals, read_stream
from pdlaunch.errors import ConfigError, PdlaunchError
from tests.bench.fake_openai import FakeOpenAI, event

MOONCAKE = (
    {"timestamp": 27000, "input_length": 1100, "output_length": 3, "hash_ids": [4, 5, 6]},
    {"timestamp": 27050, "input_length": 600, "output_length": 2, "hash_ids": [4, 9]},
)
SMALL = {"input_tokens": (5,), "output_tokens": 3, "concurrencies": (1,), "num_requests": 2}
DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def serving(server: FakeOpenAI) -> AsyncIterator[str]:
    runner = await server.start()
    try:
        yield server.url
    finally:
        await runner.cleanup()


async def bench(
    server: FakeOpenAI, show: Callable[[str], None] = lambda _: None, **options: Any
) -> list[BenchRun]:
    async with serving(server) as url:
        return [run async for run in bench_serve(BenchOptions(url=url, **options), show)]


async def test_rows_by_length_and_concurrency() -> None:
    server, shown = FakeOpenAI(), list[str]()
    lengths = {"input_tokens": (5, 20), "concurrencies": (1, 2), "num_requests": 4}
    runs = await bench(server, shown.append, output_tokens=3, max_token_id=102, **lengths)
    rows = [run.row for run in runs]
    loads = [(row.input_tokens, row.concurrency) for row in rows]
    assert loads == [(5, 1), (5, 2), (20, 1), (20, 2)]
    assert all((row.num_requests, row.num_errors, row.errors) == (4, 0, []) for row in rows)
    assert [len(prompt) for prompt in server.prompts] == [5, 20, *[5] * 8, *[20] * 8]
    assert {token_id for prompt in server.prompts for token_id in prompt} == {100, 101}
    assert server.most_open == 2
    assert shown[-1] == "16 of 16 requests, about 0 s left"


async def test_a_rate_sends_without_waiting_for_answers() -> None:
    options = {"concurrencies": (), "request_rates": (500.0,), "goals": Goals(e2e_ms=60_000)}
    (run,) = await bench(FakeOpenAI(), **SMALL | {"num_requests": 10} | options)
    row = run.row
    assert (row.concurrency, row.request_rate, row.burstiness) == (None, 500.0, 1.0)
    assert (row.num_requests, row.total_prompt_tokens, row.total_output_tokens) == (10, 50, 30)
    assert (row.good_share, row.goodput_per_s) == (1.0, row.requests_per_s)
    assert row.load == "500 a second"


@pytest.mark.parametrize(("burstiness", "spread"), [(0.25, 2.0), (1.0, 1.0), (100.0, 0.1)])
def test_requests_come_at_the_rate_and_in_bursts(burstiness: float, spread: float) -> None:
    times = arrival_times(5.0, burstiness, 4001, random.Random(1))
    assert times[0] == 0.0
    pauses = [late - early for early, late in pairwise(times)]
    mean = sum(pauses) / len(pauses)
    deviation = math.sqrt(sum((pause - mean) ** 2 for pause in pauses) / len(pauses))
    assert mean == pytest.approx(0.2, rel=0.1)
    assert deviation / mean == pytest.approx(spread, rel=0.15)


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


async def test_a_trace_is_sent_at_its_times_with_its_lengths(tmp_path: Path) -> None:
    server = FakeOpenAI()
    server.max_model_len = 1000
    trace = read_trace_file(write(tmp_path / "trace", *MOONCAKE, MOONCAKE[1]))
    (run,) = await bench(server, trace=trace, concurrencies=())
    assert [len(prompt) for prompt in server.prompts[1:]] == [600, 600]
    assert server.prompts[1][:HASHED_TOKENS] == server.prompts[2][:HASHED_TOKENS]
    assert (run.row.num_requests, run.row.num_left_out, run.row.input_tokens) == (2, 1, 600)
    assert (run.row.load, run.row.total_output_tokens) == ("as in the trace", 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no request"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 1}\n{"a"', "line 2: "),
        ('{"input_length": "3", "output_length": 1}', r"line 1: Expected `int`.*input_length"),
        ('{"input_length": 0, "output_length": 1}', "line 1: Expected `int` >= 1"),
        ('{"input_length": 3, "output_length": 1}', "line 1: .*`timestamp`"),
    ],
)
def test_a_broken_trace_says_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace_file(tmp_path / "trace")


async def test_a_context_that_is_too_short_is_told_before_anything_is_sent() -> None:
    server = FakeOpenAI()
    server.max_model_len = 100
    trace = [TraceRequest(input_length=1100, output_length=3, timestamp=0)]
    for options in ({"input_tokens": (8, 99), "output_tokens": 2}, {"trace": trace}):
        with pytest.raises(PdlaunchError, match=r"max_model_len 100.*--max-model-len"):
            await bench(server, **options)
    assert server.prompts == []


async def test_refusals_are_counted_with_their_reasons() -> None:
    server = FakeOpenAI()

    def show(text: str) -> None:
        if text.startswith("1 of 5"):
            full, starting = b'{"error": {"message": "full"}}', b'{"error": {"message": "wait"}}'
            server.refusals = [(429, full), (429, full), (503, starting)]

    (run,) = await bench(server, show, **SMALL | {"num_requests": 5})
    assert (run.row.num_requests, run.row.num_errors) == (5, 3)
    assert run.row.errors == ["2 x HTTP 429: full", "1 x HTTP 503: wait"]


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (b"", "the stream ended without [DONE]"),
        (b"data: {no json\n\n", "an event is not in OpenAI's format: "),
        (event(choices=[{"token_ids": [1]}]) + DONE, "0 tokens instead of 3"),
        (event(choices=[], usage={"completion_tokens": 3}) + DONE, "no chunk with a token"),
        (event(error={"message": "the engine died"}) + DONE, "in the stream: the engine died"),
    ],
)
async def test_broken_streams_are_errors(broken: bytes, error: str) -> None:
    server = FakeOpenAI()
    server.broken = broken
    with pytest.raises(PdlaunchError) as raised:
        await bench(server, **SMALL)
    assert f"prompt tokens: {error}" in str(raised.value)


@pytest.mark.parametrize("answer", [{}, {"data": []}, {"data": ["a"]}, 3])
async def test_what_has_no_models_is_no_deployment(answer: Any) -> None:
    server = FakeOpenAI()
    server.models = answer
    with pytest.raises(PdlaunchError, match="without a list of models"):
        await bench(server)


def token(*token_ids: int) -> bytes:
    return event(choices=[{"index": 0, "text": "a", "token_ids": token_ids}], usage=None)


async def read(*timed_pieces: tuple[float, bytes]) -> TimedCompletion:
    async def pieces() -> AsyncIterator[bytes]:
        for _, piece in timed_pieces:
            yield piece

    times_s = iter([time_s for time_s, _ in timed_pieces])
    completion = TimedCompletion(start_at=10.0)
    await read_stream(pieces(), completion, lambda: next(times_s))
    return completion


async def test_the_first_gap_is_none_of_the_inter_token_times() -> None:
    usage = {"completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 7}}
    last = event(choices=[], usage=usage) + DONE
    found = await read((11.0, token(4)), (15.0, token(5)), (15.5, token(6)), (17.0, last))
    assert (found.ttft_s, found.all_gaps_s[0], found.inter_token_s) == (1.0, 4.0, [0.5])
    assert (found.error, found.num_tokens, found.num_cached_tokens) == (None, 3, 7)


async def test_tokens_have_the_time_of_the_read_that_ends_them() -> None:
    whole = token(4) + token(5)
    for cut in range(1, len(whole)):
        found = await read((11.0, whole[:cut]), (12.0, whole[cut:]), (13.0, DONE))
        ends = (len(token(4)) - 1, len(whole) - 1)
        assert found.tokens_at == [11.0 if cut >= end else 12.0 for end in ends]
    # Servers that do not tell token ids send a token in each chunk.
    found = await read((11.0, event(choices=[{"text": "a"}])), (12.0, token(7, 8) + DONE))
    assert found.tokens_at == [11.0, 12.0, 12.0]


def answered(*tokens_at: float, error: str | None = None) -> TimedCompletion:
    return TimedCompletion(
        start_at=0.0, tokens_at=list(tokens_at), num_tokens=len(tokens_at), error=error
    )


def row(*done: TimedCompletion) -> BenchRow:
    return summarise(BenchLoad(input_tokens=8, requests=(), concurrency=2), done, 4.0)


def test_figures_of_known_times() -> None:
    failed = [answered(error=reason) for reason in ("no", "no", "never")]
    found = row(answered(1.0, 3.0, 3.5, 4.0), answered(2.0, 6.0, 6.0, 7.0), *failed)
    assert (found.num_requests, found.num_errors, found.errors) == (5, 3, ["2 x no", "1 x never"])
    assert (found.ttft_ms_median, found.ttft_ms_p99) == (1500, 2000)
    assert (found.first_gap_ms_median, found.first_gap_ms_p99) == (3000, 4000)
    assert (found.itl_ms_median, found.itl_ms_p99) == (500, 1000)
    assert found.tpot_ms_median == round((3000 + 5000) / 3 / 2, 2)
    assert found.output_tokens_per_s == 2.0
    of_nothing = row(answered(error="no"), answered(1.0))
    assert (of_nothing.first_gap_ms_median, of_nothing.itl_ms_p99) == (None, None)
    assert b"NaN" not in msgspec.json.encode(row(answered(error="no")))
    seconds = [index / 1000 for index in range(1, 201)]
    assert (quantile_ms(seconds, 0.5), quantile_ms(seconds, 0.99)) == (100.5, 199.0)


def test_a_request_is_good_within_all_goals() -> None:
    quick = answered(0.1, 0.15, 0.2)
    assert read_goals("ttft=110, itl=51,tpot=51,e2e=210").met_by(quick)
    assert str(read_goals("ttft=110,e2e=210")) == "ttft 110 ms, e2e 210 ms"
    for missed in ("ttft=90", "itl=45", "tpot=45", "e2e=190"):
        assert not read_goals(missed).met_by(quick)
    assert not Goals(e2e_ms=1000).met_by(answered(0.1, error="gone"))
    assert Goals(itl_ms=1).met_by(answered(0.1)), "one token has no gap"
    assert not Goals()


def test_one_gap_in_a_hundred_may_be_longer() -> None:
    times = [n / 1000 for n in range(100)]
    assert Goals(itl_ms=2).met_by(answered(*times, times[-1] + 1))
    assert not Goals(itl_ms=2).met_by(answered(*times, times[-1] + 1, times[-1] + 2))


@pytest.mark.parametrize("text", ["tftt=3", "ttft", "ttft=0", "ttft=nan"])
def test_goals_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"tftt|ttft.*write ttft=200"):
        read_goals(text)
