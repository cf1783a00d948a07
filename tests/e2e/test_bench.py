"""Benchmarks of a real deployment; their figures are nobody's business here."""

from __future__ import annotations

from pdlaunch.bench.serve.multi_turn import MultiTurnOptions, bench_multi_turn
from pdlaunch.bench.serve.sweep import BenchOptions, bench_serve
from pdlaunch.client.deployment import Deployment


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
        figures = (
            row.ttft_ms_median,
            row.first_gap_ms_median,
            row.itl_ms_median,
            row.tpot_ms_median,
        )
        assert all(figure is not None and figure > 0 for figure in figures)


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
    assert [(row.prompt_tokens, row.num_requests, row.errors) for row in report.turns] == [
        (40, 2, []),
        (48, 2, []),
    ]
    # Two full blocks of the first prompt.
    assert [row.cached_share for row in report.turns] == [0.0, round(32 / 48, 3)]
