"""Benchmarks of a real deployment; the size of their figures is not tested."""

from __future__ import annotations

from pdlaunch.bench.loads import BenchOptions
from pdlaunch.bench.serve import bench_serve
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
        # On a busy machine, several tokens may arrive at the same time.
        gaps = (row.first_gap_ms_median, row.itl_ms_median, row.tpot_ms_median)
        assert all(gap is not None and gap >= 0 for gap in gaps)
