"""Writes the HTML reports of ``bench serve --report`` and ``smoke --report``: one file each, with
its own style, without scripts or other files (``report.html``).

Neither prompts nor answers nor what errors say in detail are in a report, as it is passed on.
"""

from __future__ import annotations

import contextlib
import math
import platform
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from pdlaunch import __version__
from pdlaunch.bench.serve.rows import BenchRow, BenchRun, TierRow, without_words
from pdlaunch.bench.serve.timed_completion import Goals
from pdlaunch.cli.output import print_errors
from pdlaunch.cli.status import duration
from pdlaunch.launch.client.smoke import Check

NUM_COLOURS = 8
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 280, 54, 508, 10, 240
_MAX_POINTS = 200
_LIBRARIES = ("torch", "transformers", "nixl", "vllm")
_COLUMNS = {
    "num_requests": "requests",
    "num_errors": "errors",
    "ttft_ms_median": "TTFT median",
    "ttft_ms_p99": "p99",
    "first_gap_ms_median": "gap median",
    "itl_ms_median": "ITL median",
    "itl_ms_p99": "p99",
    "tpot_ms_median": "TPOT median",
    "e2e_ms_median": "whole median",
    "seconds": "took, s",
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "tokens/s",
    "goodput_per_s": "good/s",
    "good_share": "good share",
}
_AXES = {
    "concurrency": "requests at a time",
    "request_rate": "requests sent a second",
    "turn": "turn",
}
Point = tuple[float, float]


def bench_page(runs: Sequence[BenchRun], goals: Goals, tiers: Sequence[TierRow] = ()) -> str:
    """Return the page of a benchmark; ``tiers``: what caches held of the prompts of chats."""
    rows = [run.row for run in runs]
    best = max(rows, key=lambda row: row.output_tokens_per_s)
    of_goals = f" · goals: {goals}" if goals else ""
    columns = [name for name in _COLUMNS if any(getattr(row, name) is not None for row in rows)]
    tables = [
        {
            "title": "All figures",
            "headings": ["prompt", "load", *(_COLUMNS[name] for name in columns)],
            "words": 2,
            "rows": [
                [row.input_tokens, row.load, *(_number(getattr(row, name)) for name in columns)]
                for row in rows
            ],
            "note": " ".join(_notes(rows)),
        }
    ]
    if tiers:
        cells = [[tier.role, tier.tier, f"{tier.hit_share:.1%}"] for tier in tiers]
        headings = ["engines", "cache tier", "hits"]
        tables.append({"title": "Prefix caches", "headings": headings, "words": 2, "rows": cells})
    return _render(
        title="pdlaunch bench serve",
        lead=f"{runs[0].model} · what the clients of a deployment see{of_goals}",
        cards={
            "requests": f"{sum(row.num_requests for row in rows):,}",
            "errors": f"{sum(row.num_errors for row in rows):,}",
            "prompt tokens": f"{sum(row.total_prompt_tokens for row in rows):,}",
            "output tokens": f"{sum(row.total_output_tokens for row in rows):,}",
            "in all": duration(sum(row.seconds for row in rows)),
            f"output tokens/s, {best.load}": f"{best.output_tokens_per_s:,.1f}",
        },
        plots=list(_plots(runs, goals)),
        tables=tables,
        facts_title="Where it was measured",
        facts={"Model": runs[0].model},
    )


def smoke_page(checks: Sequence[Check], deployment: Mapping[str, object]) -> str:
    """Return the page of a smoke run: each check, its result, how long it took."""
    num_failed = sum(check.failure is not None for check in checks)
    failed, passed = f"{num_failed} of {len(checks)} checks failed", f"{len(checks)} checks passed"
    marks = {True: "\u2713 ok", False: "\u2717 failed"}
    return _render(
        title="pdlaunch smoke",
        lead=failed if num_failed else passed,
        cards={
            "checks": len(checks),
            "failed": num_failed,
            "in all": duration(sum(check.seconds for check in checks)),
            "until it was ready": duration(checks[0].seconds) if checks else "-",
        },
        tables=[
            {
                "title": "Checks",
                "headings": ["", "check", "why it failed", "took, s"],
                "words": 3,
                "rows": [
                    [
                        marks[check.failure is None],
                        check.name,
                        check.failure or "",
                        f"{check.seconds:.3f}",
                    ]
                    for check in checks
                ],
            }
        ],
        facts_title="What was checked",
        facts=dict(deployment),
    )


def write_report(path: Path, page: str) -> int:
    """Write the file of ``--report``; return the exit code, 1 when that failed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        print_errors([f"--report {path} cannot be written: {error.strerror or error}"])
        return 1
    return 0


def _render(*, facts: dict[str, object], **values: object) -> str:
    # Imported here: other commands do not wait for it.
    from jinja2 import Environment

    facts |= {"pdlaunch": __version__, "Python": platform.python_version()}
    for name in _LIBRARIES:
        # One that is not installed has no version.
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    facts["Machine"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    date = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
    # Names of models and errors are escaped.
    environment = Environment(autoescape=True)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text())
    return template.render(version=__version__, date=date, facts=facts, **values)


def _plots(runs: Sequence[BenchRun], goals: Goals) -> Iterator[dict[str, Any]]:
    first, gaps = {}, {}
    for run in runs[:NUM_COLOURS]:
        good = [each for each in run.done if each.error is None]
        name = f"{run.row.input_tokens} in, {run.row.load}"
        first[name] = shares([each.ttft_s * 1000 for each in good])
        gaps[name] = shares([gap_s * 1000 for each in good for gap_s in each.inter_token_s])
    left_out = len(runs) - NUM_COLOURS
    note = f" The last {left_out} rows are left out." if left_out > 0 else ""
    caption = f"Which share of the requests had their first token within this time.{note}"
    yield plot("Time to first token", caption, first, "ms", "share of them")
    caption = f"From the second token on: without the gap in which KV blocks move.{note}"
    yield plot("Time between tokens", caption, gaps, "ms", "share of them")
    rows = [run.row for run in runs]
    of_chats = any(row.turn is not None for row in rows)
    for attribute, x_label in _AXES.items():
        measured = [row for row in rows if getattr(row, attribute) is not None]
        if not measured or of_chats is not (attribute == "turn"):
            continue
        over = attribute.removeprefix("request_")
        figures = [("Throughput", "Output tokens of all requests a second.", "output_tokens_per_s")]
        if goals:
            said = f"Requests a second that met the goals ({goals})."
            figures.append(("Goodput", said, "goodput_per_s"))
        figures.append(
            ("Requests", "Requests a second, answered without an error.", "requests_per_s")
        )
        for title, caption, name in figures:
            series = _over(measured, attribute, name)
            yield plot(f"{title} over {over}", caption, series, x_label, name.replace("_per_", "/"))


def _over(rows: Sequence[BenchRow], attribute: str, figure: str) -> dict[str, list[Point]]:
    """Return a line for each prompt length; of chats, whose prompts grow, one for all."""

    def name(row: BenchRow) -> str:
        return "all chats" if attribute == "turn" else f"{row.input_tokens} in"

    ordered = sorted(rows, key=lambda row: (row.input_tokens, getattr(row, attribute)))
    return {
        label: [(getattr(row, attribute), getattr(row, figure) or 0.0) for row in group]
        for label, group in groupby(ordered, key=name)
    }


def shares(values: Sequence[float]) -> list[Point]:
    """Return values and which share is at most as large: no more points than can be seen."""
    ordered = sorted(value for value in values if value > 0)
    step = max(1, len(ordered) // _MAX_POINTS)
    picked = [*ordered[::step], *ordered[-1:]]
    return [(value, bisect_right(ordered, value) / len(ordered)) for value in picked]


def plot(
    title: str, caption: str, series: Mapping[str, Sequence[Point]], x_label: str, y_label: str
) -> dict[str, Any]:
    """Return a plot with the places of its lines and ticks; both axes begin at 0."""
    points = [point for line in series.values() for point in line]
    x_high = max((x for x, _ in points), default=0.0) * 1.04 or 1.0
    y_high = max((y for _, y in points), default=0.0) * 1.08 or 1.0

    def place_x(value: float) -> float:
        return round(_LEFT + value / x_high * (_RIGHT - _LEFT), 1)

    def place_y(value: float) -> float:
        return round(_BOTTOM - value / y_high * (_BOTTOM - _TOP), 1)

    lines = [
        {"name": name, "points": [(place_x(x), place_y(y), f"{x:g}, {y:g}") for x, y in line]}
        for name, line in series.items()
        if line
    ]
    return {
        **{"title": title, "caption": caption, "x_label": x_label, "y_label": y_label},
        **{"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT},
        **{"top": _TOP, "bottom": _BOTTOM, "lines": lines},
        "x_ticks": [(f"{value:g}", place_x(value)) for value in _ticks(x_high)],
        "y_ticks": [(f"{value:g}", place_y(value)) for value in _ticks(y_high)],
    }


def _ticks(high: float) -> list[float]:
    """Return round values from 0 to ``high``, about five."""
    power = 10.0 ** math.floor(math.log10(high / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= high / 5 * 0.999)
    return [number * step for number in range(math.floor(high / step) + 1)]


def _notes(rows: Sequence[BenchRow]) -> Iterator[str]:
    """Yield what the figures mean, and how often what went wrong."""
    yield "Times are milliseconds as clients see them; gap: first to second token."
    kinds: dict[str, int] = {}
    for row in rows:
        for error in without_words(row.errors):
            count, _, kind = error.partition(" x ")
            kinds[kind] = kinds.get(kind, 0) + int(count)
    yield from (f"{count} requests failed: {kind}." for kind, count in kinds.items())
    if left_out := sum(row.num_left_out for row in rows):
        yield f"{left_out} requests of the trace were too long for the model and left out."


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{0 if value >= 1000 else 2}f}"
