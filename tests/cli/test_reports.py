"""The report of ``bench serve``: plots and figures in one file, and nothing nobody should read."""

import re
from pathlib import Path

import pytest

from pdlaunch.bench.serve import BenchLoad, BenchRun, summarise
from pdlaunch.bench.timed_completion import Goals, TimedCompletion
from pdlaunch.cli.html_report import bench_page, write_report

EVIL = "<script>alert('name')</script>&"


def run(
    *, concurrency: int | None = None, rate: float | None = None, input_tokens: int = 5
) -> BenchRun:
    done = [
        TimedCompletion(
            start_at=10.0 + n,
            tokens_at=[10.25 + n, 10.3 + n, 10.5 + n],
            num_tokens=3,
            num_prompt_tokens=input_tokens,
        )
        for n in range(4)
    ]
    done.append(TimedCompletion(start_at=12.0, error="HTTP 400: the secret prompt is too long"))
    load = BenchLoad(
        input_tokens=input_tokens, requests=(), concurrency=concurrency, request_rate=rate
    )
    row = summarise(load, done, 4.0, goals=Goals(ttft_ms=300))
    return BenchRun(row=row, done=done, model=EVIL)


def cells(content: str, tag: str) -> list[str]:
    return re.findall(rf"<{tag}>([^<]*)", content)


def test_the_page_has_plots_and_figures_and_loads_nothing() -> None:
    runs = [run(concurrency=1), run(concurrency=4), run(rate=2.0), run(rate=4.0)]
    content = bench_page(runs, Goals(ttft_ms=300))
    assert {
        "Time to first token",
        "Time between tokens",
        "Throughput over concurrency",
        "Goodput over rate",
    } <= set(cells(content, "h3"))
    assert cells(content, "td").count("250.00") == 8, "median and p99 of the first token"
    assert cells(content, "td").count("0.80") == 4, "the share that met the goals"
    assert not re.search(r"<(script|link|img|iframe)|(src|href)=|https?://|@import|url\(", content)
    # Names are escaped, and what was said is left out.
    assert EVIL not in content
    assert "&lt;script&gt;alert" in content
    assert "secret" not in content
    assert "1 at once: 1 request failed: HTTP 400." in content


def test_one_row_without_an_answer_makes_a_page_too() -> None:
    failed = [TimedCompletion(start_at=1.0, error="no answer in time")]
    row = summarise(BenchLoad(input_tokens=5, requests=(), concurrency=1), failed, 1.0)
    assert bench_page([BenchRun(row=row, done=failed, model="m")], Goals())


def test_a_folder_that_cannot_be_written_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert write_report(tmp_path / "new" / "a.html", [run(concurrency=1)], Goals()) == 0
    assert "pdlaunch bench serve" in (tmp_path / "new" / "a.html").read_text()
    assert write_report(tmp_path / "file" / "a.html", [run(concurrency=1)], Goals()) == 1
    assert "error: --report" in capsys.readouterr().err
