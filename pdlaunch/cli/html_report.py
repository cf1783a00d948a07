"""Writes the HTML reports of ``bench serve --report`` and ``verdict``, each a single file.

Users pass reports on, so a report contains no prompts, no answers and no details of errors.
"""

import math
import platform
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

from pdlaunch import __version__
from pdlaunch.bench.serve import BenchRow, BenchRun, without_words
from pdlaunch.bench.timed_completion import Goals
from pdlaunch.bench.verdict.search import Findings
from pdlaunch.bench.verdict.verdict import Verdict
from pdlaunch.cli.output import counted, print_errors
from pdlaunch.cli.status import duration

NUM_COLOURS = 8
_MAX_POINTS = 200
# The text of a server after the HTTP status of an error: see ``without_words``
_MESSAGE = re.compile(
    r"(?:(?<=no request was answered)|(?<=request of the load failed))(?!: HTTP).*"
    r"|(?<=: HTTP \d{3}):.*"
)
# Column headings of the report and of the table on the terminal
HEADINGS = {
    "input_tokens": "in",
    "concurrency": "at\nonce",
    "request_rate": "rate\n/s",
    "num_requests": "reqs",
    "num_errors": "errs",
    "ttft_ms_median": "TTFT\nmedian",
    "ttft_ms_p99": "TTFT\np99",
    "first_gap_ms_median": "gap\nmedian",
    "first_gap_ms_p99": "gap\np99",
    "itl_ms_median": "ITL\nmedian",
    "itl_ms_p99": "ITL\np99",
    "tpot_ms_median": "TPOT\nmedian",
    "e2e_ms_median": "whole\nmedian",
    "pair_share": "by\npairs",
    "cached_share": "cached",
    "seconds": "took\ns",
    "requests_per_s": "reqs\n/s",
    "output_tokens_per_s": "tokens\n/s",
    "goodput_per_s": "good\n/s",
    "good_share": "good\nshare",
}
_AXES = {"concurrency": "concurrent requests", "request_rate": "requests sent per second"}
Point = tuple[float, float]


def write_report(path: Path, runs: Sequence[BenchRun], goals: Goals) -> int:
    """Write the file of ``--report``; return the exit code, 1 if that failed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(bench_page(runs, goals), encoding="utf-8")
    except OSError as error:
        print_errors([f"--report {path} cannot be written: {error.strerror or error}"])
        return 1
    return 0


def bench_page(runs: Sequence[BenchRun], goals: Goals) -> str:
    """Return the page of a benchmark."""
    rows = [run.row for run in runs]
    best = max(rows, key=lambda row: row.output_tokens_per_s)
    columns = [name for name in HEADINGS if any(getattr(row, name) is not None for row in rows)]
    return _render(
        title="pdlaunch bench serve",
        lead=f"{runs[0].model} · times as clients of the deployment see them"
        + (f" · goals: {goals}" if goals else ""),
        cards={
            "requests": f"{sum(row.num_requests for row in rows):,}",
            "errors": f"{sum(row.num_errors for row in rows):,}",
            "prompt tokens": f"{sum(row.total_prompt_tokens for row in rows):,}",
            "output tokens": f"{sum(row.total_output_tokens for row in rows):,}",
            "in all": duration(sum(row.seconds for row in rows)),
            f"output tokens/s, {best.load}": f"{best.output_tokens_per_s:,.1f}",
        },
        plots=list(_plots(runs, goals)),
        headings=[HEADINGS[name] for name in columns],
        rows=[[_cell(getattr(row, name)) for name in columns] for row in rows],
        notes=list(_notes(rows)),
        facts={"Model": runs[0].model},
    )


def verdict_page(found: Verdict, findings: Findings, goals: str) -> str:
    """Return the page of ``pdlaunch verdict``."""
    # An arm has the same colour in each plot.
    arms = [row["arm"] for row in found.rows][:NUM_COLOURS]
    probes = sorted(findings.probes, key=lambda probe: probe.rate)

    def rates(title: str, caption: str, figure: str, label: str) -> dict[str, Any]:
        series: dict[str, list[Point]] = {arm: [] for arm in arms}
        for each in probes:
            if each.arm in series:
                series[each.arm].append((each.rate, getattr(each.row, figure) or 0.0))
        return plot(title, caption, series, "requests sent per second", label)

    asked, columns = f"The goals: {goals}.", list(found.rows[0]) if found.rows else []
    out = [f"Not measured: {name}: {reason}" for name, reason in found.ruled_out.items()]
    return _render(
        title="pdlaunch verdict",
        lead=found.text,
        cards={
            f"{row['arm']}, good requests/s": f"{row['bound'].strip('-')} {row['goodput']:.3g}"
            for row in found.rows
        },
        plots=[
            rates("Share within the goals", asked, "good_share", "share of requests"),
            rates("Time to first token, p99", "", "ttft_ms_p99", "ms"),
            rates("Time between tokens, p99", "", "itl_ms_p99", "ms"),
        ],
        headings=[name.replace("_", " ") for name in columns],
        rows=[[_cell(row[name]) for name in columns] for row in found.rows],
        notes=[
            "Times are milliseconds as clients see them.",
            found.note,
            *(_MESSAGE.sub("", line) + "." for line in out),
        ],
        facts={},
    )


def _render(*, facts: Mapping[str, str], **values: object) -> str:
    # Imported here, so that other commands start faster.
    from jinja2 import Environment

    # Autoescape, because names of models and errors may contain HTML.
    environment = Environment(autoescape=True)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text())
    machine = f"{platform.system()} {platform.release()}, {platform.machine()}"
    here = {"Python": platform.python_version(), "Machine": machine}
    date = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
    return template.render(facts={**facts, **here}, version=__version__, date=date, **values)


def _plots(runs: Sequence[BenchRun], goals: Goals) -> Iterator[dict[str, Any]]:
    first, gaps = {}, {}
    for run in runs[:NUM_COLOURS]:
        good = [each for each in run.done if each.error is None]
        name = f"{run.row.input_tokens} in, {run.row.load}"
        first[name] = shares([each.ttft_s * 1000 for each in good])
        gaps[name] = shares([gap_s * 1000 for each in good for gap_s in each.inter_token_s])
    left_out = len(runs) - NUM_COLOURS
    note = f" The last {left_out} rows are left out." if left_out > 0 else ""
    caption = f"Share of the requests that had their first token within this time.{note}"
    yield plot("Time to first token", caption, first, "ms", "share of requests")
    caption = f"From the second token on, without the gap in which KV blocks move.{note}"
    yield plot("Time between tokens", caption, gaps, "ms", "share of requests")
    figures = {"output_tokens_per_s": ("Throughput", "Output tokens of all requests per second.")}
    if goals:
        said = f"Requests per second that met the goals ({goals})."
        figures["goodput_per_s"] = ("Goodput", said)
    for attribute, x_label in _AXES.items():
        rows = [run.row for run in runs if getattr(run.row, attribute) is not None]
        if rows:
            over = attribute.removeprefix("request_")
            for figure, (title, caption) in figures.items():
                series: dict[str, list[Point]] = {}
                for row in sorted(rows, key=attrgetter("input_tokens", attribute)):
                    point = (getattr(row, attribute), getattr(row, figure) or 0.0)
                    series.setdefault(f"{row.input_tokens} in", []).append(point)
                y_label = figure.replace("_per_", "/")
                yield plot(f"{title} over {over}", caption, series, x_label, y_label)


def shares(values: Sequence[float]) -> list[Point]:
    """Return up to about ``_MAX_POINTS`` values, each with the share that is at most as large."""
    ordered = sorted(value for value in values if value > 0)
    step = max(1, len(ordered) // _MAX_POINTS)
    picked = [*ordered[::step], *ordered[-1:]]
    return [(value, bisect_right(ordered, value) / len(ordered)) for value in picked]


def plot(
    title: str, caption: str, series: Mapping[str, Sequence[Point]], x_label: str, y_label: str
) -> dict[str, Any]:
    """Return the data of a plot for ``report.html``. Both axes begin at 0."""
    points = [point for line in series.values() for point in line]
    x_high = max((x for x, _ in points), default=0.0) * 1.04 or 1.0
    y_high = max((y for _, y in points), default=0.0) * 1.08 or 1.0
    return {
        **{"title": title, "caption": caption, "x_label": x_label, "y_label": y_label},
        **{"x_high": x_high, "x_ticks": _ticks(x_high)},
        **{"y_high": y_high, "y_ticks": _ticks(y_high)},
        "lines": {name: points for name, points in series.items() if points},
    }


def _ticks(high: float) -> list[float]:
    """Return round values from 0 to ``high``, about five."""
    power = 10.0 ** math.floor(math.log10(high / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= high / 5 * 0.999)
    return [number * step for number in range(math.floor(high / step) + 1)]


def _notes(rows: Sequence[BenchRow]) -> Iterator[str]:
    """Yield the meaning of the figures, and the number of failed requests by cause."""
    yield "Times are milliseconds as clients see them; gap: first to second token."
    for row in rows:
        for error in without_words(row.errors):
            count, _, kind = error.partition(" x ")
            failed = counted(int(count), "request")
            yield f"{row.input_tokens} in, {row.load}: {failed} failed: {kind}."
    if left_out := sum(row.num_left_out for row in rows):
        verb = "was" if left_out == 1 else "were"
        yield f"{counted(left_out, 'request')} of the trace {verb} too long for the model."


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.{0 if value >= 1000 else 2}f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
