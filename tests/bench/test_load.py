"""When requests are sent, what they are made of, and which of them are good."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pdlaunch.bench.serve.loads import (
    HASHED_TOKENS,
    BenchOptions,
    TraceRequest,
    arrival_times,
    prompt_tokens,
    read_trace_file,
)
from pdlaunch.bench.serve.rows import BenchRun, summarise, vllm_result
from pdlaunch.bench.serve.sweep import BenchProgress, bench_serve
from pdlaunch.bench.serve.timed_completion import Goals, TimedCompletion, read_goals
from pdlaunch.errors import ConfigError, PdlaunchError
from tests.bench.fake_openai import FakeOpenAI
from tests.bench.test_serve import serving

MOONCAKE = (
    {"timestamp": 27000, "input_length": 1100, "output_length": 3, "hash_ids": [4, 5, 6]},
    {"timestamp": 27050, "input_length": 600, "output_length": 2, "hash_ids": [4, 9]},
)
TOKENS = range(100, 5000)


def write(path: Path, records: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def pauses(burstiness: float) -> list[float]:
    times = arrival_times(5.0, burstiness, 4001, random.Random(1))
    assert times[0] == 0.0
    return [late - early for early, late in pairwise(times)]


@pytest.mark.parametrize(("burstiness", "spread"), [(0.25, 2.0), (1.0, 1.0), (100.0, 0.1)])
def test_requests_come_at_the_rate_and_in_bursts(burstiness: float, spread: float) -> None:
    found = pauses(burstiness)
    mean = sum(found) / len(found)
    deviation = math.sqrt(sum((pause - mean) ** 2 for pause in found) / len(found))
    assert mean == pytest.approx(0.2, rel=0.1)
    assert deviation / mean == pytest.approx(spread, rel=0.15)


def test_goals_are_read_with_and_without_units() -> None:
    assert read_goals("ttft=200,itl=0.05s, e2e=3000ms") == Goals(
        ttft_ms=200, itl_ms=50, e2e_ms=3000
    )
    assert str(read_goals("ttft=0.2s")) == "ttft 200 ms"
    assert not Goals()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tftt=3", "'tftt' is none of ttft, tpot, itl, e2e"),
        ("ttft", "'' is no time such as 200"),
        ("ttft=0", "'0' is no time"),
        ("ttft=3min", "'3min' is no time"),
        ("ttft=nan", "'nan' is no time"),
    ],
)
def test_goals_that_say_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_goals(text)


def completion(*tokens_at: float, error: str | None = None) -> TimedCompletion:
    return TimedCompletion(
        start_at=10.0, tokens_at=list(tokens_at), num_tokens=len(tokens_at), error=error
    )


def test_a_request_is_good_within_all_goals() -> None:
    quick = completion(10.1, 10.15, 10.2)
    assert Goals(ttft_ms=110, itl_ms=51, tpot_ms=51, e2e_ms=210).met_by(quick)
    for missed in ({"ttft_ms": 90}, {"itl_ms": 45}, {"tpot_ms": 45}, {"e2e_ms": 190}):
        assert not Goals(**missed).met_by(quick)
    assert not Goals(e2e_ms=1000).met_by(completion(10.1, error="gone"))
    assert Goals(itl_ms=1).met_by(completion(10.1)), "one token has no gap"


def test_one_gap_in_a_hundred_may_be_longer() -> None:
    times = [10 + n / 1000 for n in range(100)]
    assert Goals(itl_ms=2).met_by(completion(*times, times[-1] + 1))
    assert not Goals(itl_ms=2).met_by(completion(*times, times[-1] + 1, times[-1] + 2))


def test_progress_says_how_many_and_how_long() -> None:
    now, said = 0.0, list[str]()
    progress = BenchProgress(8, said.append, lambda: now)
    progress.begin("4 at once")
    now = 30.0
    progress.one_done()
    progress.one_done()
    assert said[0] == "4 at once"
    assert said[-1] == "4 at once; 2 of 8 requests, about 90 s left"


def test_equal_hashes_are_equal_tokens(tmp_path: Path) -> None:
    first, second = read_trace_file(write(tmp_path / "t.jsonl", MOONCAKE))
    assert (first.at_s, second.at_s) == pytest.approx((0.0, 0.05))
    one, two = (prompt_tokens(item, TOKENS, 1) for item in (first, second))
    assert (len(one), len(two)) == (1100, 600)
    assert one[:HASHED_TOKENS] == two[:HASHED_TOKENS]
    assert one[HASHED_TOKENS:600] != two[HASHED_TOKENS:]
    assert one == prompt_tokens(first, TOKENS, 1) != prompt_tokens(first, TOKENS, 2)


CHAT = [
    {"from": "human", "value": "a b"},
    {"from": "gpt", "value": "c d e"},
    {"from": "human", "value": "f"},
    {"from": "gpt", "value": "g"},
]


@pytest.mark.parametrize("kind", ["lines", "list", "openai"])
def test_every_answer_of_a_conversation_is_a_request(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "chats"
    openai = [
        {"role": {"human": "user", "gpt": "assistant"}[said["from"]], "content": said["value"]}
        for said in CHAT
    ]
    if kind == "list":
        path.write_text(json.dumps([{"id": "x", "conversations": CHAT}]))
    else:
        write(path, [{"messages": openai} if kind == "openai" else {"conversations": CHAT}])
    first, second = read_trace_file(path)
    assert (first.prompt, first.output) == (openai[:1], "c d e")
    assert (second.prompt, second.output) == (openai[:3], "g")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no request"),
        ('{"input_length": 3, "output_length": 1}\n{"a"', "line 2: no JSON"),
        ('{"prompt": "x"}', "line 1: it has none of input_length, conversations, messages"),
        ('{"input_length": "3", "output_length": 1}', r"line 1: Expected `int`.*input_length"),
        ('{"input_length": 0, "output_length": 1}', "line 1: input_length and output_length must"),
        ('{"input_length": 3}', "line 1: .*`output_length`"),
        ('[{"conversations": [{"from": 3}]}]', "entry 1: "),
        ("[1", "no JSON"),
    ],
)
def test_a_broken_trace_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace_file(path)


async def bench(server: FakeOpenAI, **options: Any) -> list[BenchRun]:
    async with serving(server) as url:
        runs = bench_serve(BenchOptions(url=url, **options), lambda _: None)
        return [run async for run in runs]


async def test_a_rate_sends_without_waiting_for_answers() -> None:
    server = FakeOpenAI()
    (run,) = await bench(
        server,
        input_tokens=(5,),
        output_tokens=3,
        concurrencies=(),
        request_rates=(500.0,),
        num_requests=10,
        goals=Goals(e2e_ms=60_000),
    )
    row = run.row
    assert (row.concurrency, row.request_rate, row.burstiness) == (None, 500.0, 1.0)
    assert (row.num_requests, row.total_prompt_tokens, row.total_output_tokens) == (10, 50, 30)
    assert (row.good_share, row.goodput_per_s) == (1.0, row.requests_per_s)
    assert row.load == "500 a second"


async def test_a_trace_is_sent_at_its_times_with_its_lengths(tmp_path: Path) -> None:
    server = FakeOpenAI()
    server.max_model_len = 1000
    trace = read_trace_file(write(tmp_path / "t.jsonl", [*MOONCAKE, *MOONCAKE[1:]]))
    (run,) = await bench(server, trace=trace, concurrencies=())
    assert [len(prompt) for prompt in server.prompts[1:]] == [600, 600]
    assert server.prompts[1] == server.prompts[2]
    assert (run.row.num_requests, run.row.num_left_out, run.row.input_tokens) == (2, 1, 600)
    assert (run.row.load, run.row.total_output_tokens) == ("as in the trace", 4)


async def test_a_trace_that_never_fits_is_refused(tmp_path: Path) -> None:
    server = FakeOpenAI()
    server.max_model_len = 100
    trace = read_trace_file(write(tmp_path / "t.jsonl", MOONCAKE))
    with pytest.raises(PdlaunchError, match=r"longer than max_model_len 100: .*--max-model-len"):
        await bench(server, trace=trace, concurrencies=())


async def test_conversations_are_tokenized_by_the_deployment() -> None:
    server = FakeOpenAI()
    chat = [{"role": "user", "content": "a b c"}]
    trace = [TraceRequest(prompt=chat, output="d e", number=0)]
    (run,) = await bench(server, trace=trace, concurrencies=(1,))
    assert server.prompts[-1] == [3, 3, 3]
    assert (run.row.total_prompt_tokens, run.row.total_output_tokens) == (3, 2)


async def test_what_cannot_tokenize_is_told() -> None:
    server = FakeOpenAI()
    server.tokenizes = False
    trace = [TraceRequest(prompt=[{"role": "user", "content": "a"}], output="b")]
    with pytest.raises(PdlaunchError, match="cannot be tokenized: /tokenize answers HTTP 404"):
        await bench(server, trace=trace, concurrencies=(1,))


async def test_vllm_s_result_has_its_keys_and_meanings() -> None:
    keys = json.loads((Path(__file__).parent / "vllm_result_keys.json").read_text())["keys"]
    (run,) = await bench(
        FakeOpenAI(), input_tokens=(5,), output_tokens=3, concurrencies=(2,), num_requests=4
    )
    result = vllm_result(run)
    assert list(result) == keys
    assert (result["completed"], result["failed"], result["num_prompts"]) == (4, 0, 4)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (20, 12)
    assert (result["max_concurrency"], result["request_rate"]) == (2, "inf")
    assert result["model_id"] == "made-up"
    assert 1 <= result["max_concurrent_requests"] <= 2


def test_the_figures_of_vllm_s_result() -> None:
    done = [completion(10.1, 10.2, 10.4), completion(10.3)]
    row = summarise(5, 2, done, 2.0, {}, goals=Goals(ttft_ms=200))
    result = vllm_result(BenchRun(row=row, done=done, model="m"))
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["p99_ttft_ms"] == pytest.approx(298)
    assert (result["mean_itl_ms"], result["std_itl_ms"]) == pytest.approx((150, 50))
    assert result["median_tpot_ms"] == pytest.approx(150)
    assert result["request_goodput"] == 0.5
    assert result["output_throughput"] == 2.0
    assert result["max_output_tokens_per_s"] == 4.0
    assert result["max_concurrent_requests"] == 2
