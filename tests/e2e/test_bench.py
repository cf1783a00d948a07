"""Benchmarks of a real deployment; their figures are nobody's business here."""

from __future__ import annotations

import json
from pathlib import Path

from pdlaunch.bench.loads import BenchOptions, read_trace_file
from pdlaunch.bench.serve import bench_serve
from pdlaunch.bench.timed_completion import Goals
from pdlaunch.cli.html_report import bench_page
from pdlaunch.launch.client.deployment import Deployment


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


async def test_a_trace_is_sent_and_reported(demo: Deployment, tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 40, "output_length": 3, "hash_ids": [1]},
        {"timestamp": 50, "input_length": 60, "output_length": 2, "hash_ids": [1]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    options = BenchOptions(url=demo.url, trace=read_trace_file(path), concurrencies=())
    runs = [run async for run in bench_serve(options, lambda _: None)]
    assert [(run.row.num_requests, run.row.errors) for run in runs] == [(2, [])]
    assert runs[0].row.total_prompt_tokens == 100
    assert "as in the trace" in bench_page(runs, Goals(ttft_ms=60_000))
