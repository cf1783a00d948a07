"""Benchmarks of a real deployment; their figures are nobody's business here."""

from __future__ import annotations

import json
from pathlib import Path

from pdlaunch.bench.serve.loads import BenchOptions, read_trace_file
from pdlaunch.bench.serve.sweep import MultiTurnOptions, bench_multi_turn, bench_serve
from pdlaunch.bench.serve.timed_completion import Goals
from pdlaunch.cli.html_report import bench_page
from pdlaunch.launch.client.deployment import Deployment
from tests.e2e.secrecy import places_of, told_by
from tests.router.otlp_collector import Collector


async def test_rows_have_every_figure(demo: Deployment) -> None:
    options = BenchOptions(
        url=demo.url, input_tokens=(20, 40), output_tokens=4, concurrencies=(2,), num_requests=2
    )
    rows = [run.row async for run in bench_serve(options, lambda _: None)]
    assert [(row.input_tokens, row.num_requests, row.errors) for row in rows] == [
        (20, 2, []),
        (40, 2, []),
    ]
    for row in rows:
        assert row.ttft_ms_median is not None
        assert row.ttft_ms_median > 0
        # Tokens that wait for a busy machine may come at the same time.
        gaps = (row.first_gap_ms_median, row.itl_ms_median, row.tpot_ms_median)
        assert all(gap is not None and gap >= 0 for gap in gaps)


async def test_traces_are_sent_and_reported(
    demo: Deployment, collector: Collector, tmp_path: Path
) -> None:
    """One as Mooncake publishes them, and a conversation that this deployment tokenizes."""
    lines = [
        {"timestamp": 0, "input_length": 40, "output_length": 3, "hash_ids": [1]},
        {"timestamp": 50, "input_length": 60, "output_length": 2, "hash_ids": [1]},
    ]
    said = [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Well, thanks."}]
    runs = []
    for records in (lines, [{"conversations": said}]):
        path = tmp_path / "trace.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        options = BenchOptions(url=demo.url, trace=read_trace_file(path), concurrencies=())
        runs += [run async for run in bench_serve(options, lambda _: None)]
    assert [(run.row.num_requests, run.row.errors) for run in runs] == [(2, []), (1, [])]
    assert runs[0].row.total_prompt_tokens == 100
    assert runs[1].row.total_output_tokens > 1, "as many as the recorded answer has"
    page = bench_page(runs, Goals(ttft_ms=60_000))
    assert "as in the trace" in page
    words = [part["value"] for part in said]
    assert places_of(told_by(demo, collector) | {"page": page}, words) == []


async def test_chats_find_what_they_said_before(demo: Deployment) -> None:
    options = MultiTurnOptions(
        url=demo.url,
        num_conversations=2,
        num_turns=2,
        first_tokens=40,
        turn_tokens=5,
        output_tokens=3,
        concurrency=2,
    )
    report = await bench_multi_turn(options, lambda _: None)
    assert [(row.input_tokens, row.num_requests, row.errors) for row in report.turns] == [
        (40, 2, []),
        (48, 2, []),
    ]
    # Two full blocks of the first prompt.
    assert [row.cached_share for row in report.turns] == [0.0, round(32 / 48, 3)]
