"""Writes the report of ``pdlaunch bench serve --report``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from pdlaunch.bench.serve.engine_counters import TierRow
from pdlaunch.bench.serve.goals import Goals
from pdlaunch.bench.serve.progress import duration
from pdlaunch.bench.serve.row import BenchRow, BenchRun, without_words
from pdlaunch.bench.serve.timed_completion import TimedCompletion
from pdlaunch.cli.report.page import (
    Html,
    cards,
    environment,
    facts,
    joined,
    page,
    section,
    table,
    text,
)
from pdlaunch.cli.report.plots import (
    NUM_COLOURS,
    Bar,
    Series,
    distribution,
    figure,
    legend,
    lines,
    shares,
    timeline,
)

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
_AXES = (("concurrency", "requests at a time"), ("request_rate", "requests sent a second"))
_AXES_OF_CHATS = (("turn", "turn"),)
_NO_LEGEND = Html("")


def bench_page(runs: Sequence[BenchRun], goals: Goals, tiers: Sequence[TierRow] = ()) -> Html:
    """Return the page; ``tiers``: what caches held of the prompts of chats.

    Neither prompts nor answers nor what errors say in detail are in it."""
    rows = [run.row for run in runs]
    seconds = sum(row.seconds for row in rows)
    num_requests = sum(row.num_requests for row in rows)
    lead = Html(
        f"{text(runs[0].model)} · what the clients of a deployment see"
        + (f" · goals: {text(goals)}" if goals else "")
    )
    best = max(rows, key=lambda row: row.output_tokens_per_s)
    figures = {
        "requests": f"{num_requests:,}",
        "errors": f"{sum(row.num_errors for row in rows):,}",
        "prompt tokens": f"{sum(row.total_prompt_tokens for row in rows):,}",
        "output tokens": f"{sum(row.total_output_tokens for row in rows):,}",
        "in all": duration(seconds),
        f"output tokens/s, {best.load}": f"{best.output_tokens_per_s:,.1f}",
    }
    plots = Html(f'<div class="plots">{joined(_plots(runs, goals))}</div>')
    sections = [
        cards(figures),
        section("Latency and throughput", plots),
        section("All figures", joined([_table(rows), _notes(rows)])),
        *([section("Prefix caches", _tiers(tiers))] if tiers else []),
        section("Timelines", Html(f'<div class="plots">{joined(_timelines(runs))}</div>')),
        section("Where it was measured", facts({"Model": runs[0].model} | environment())),
    ]
    return page("pdlaunch bench serve", lead, sections)


def _name(row: BenchRow) -> str:
    return f"{row.input_tokens} in, {row.load}"


def _plots(runs: Sequence[BenchRun], goals: Goals) -> Iterator[Html]:
    yield _distribution(
        runs,
        "Time to first token",
        "Up to which time which share of the requests had their first token.",
        lambda done: [completion.ttft_s for completion in done],
    )
    yield _distribution(
        runs,
        "Time between tokens",
        "From the second token on: without the gap in which KV blocks move.",
        lambda done: [gap_s for completion in done for gap_s in completion.inter_token_s],
    )
    rows = [run.row for run in runs]
    of_chats = any(row.turn is not None for row in rows)
    for attribute, words in _AXES_OF_CHATS if of_chats else _AXES:
        measured = [row for row in rows if getattr(row, attribute) is not None]
        if not measured:
            continue
        throughput = _over(measured, attribute, "output_tokens_per_s")
        yield figure(
            f"Throughput over {attribute.removeprefix('request_')}",
            "Output tokens of all requests a second.",
            lines(throughput, x_label=words, y_label="tokens/s"),
            legend(throughput),
        )
        if goals:
            good = _over(measured, attribute, "goodput_per_s")
            answered = [
                Series(f"{line.name}, all", line.points, dashed=True, colour=number)
                for number, line in enumerate(_over(measured, attribute, "requests_per_s"))
            ]
            yield figure(
                f"Goodput over {attribute.removeprefix('request_')}",
                f"Requests a second that met the goals ({goals}), and all that were answered.",
                lines([*good, *answered], x_label=words, y_label="requests/s"),
                legend([*good, *answered]),
            )
        else:
            answered = _over(measured, attribute, "requests_per_s")
            yield figure(
                "Requests a second",
                "Requests that were answered without an error.",
                lines(answered, x_label=words, y_label="requests/s"),
                legend(answered),
            )


def _distribution(
    runs: Sequence[BenchRun],
    title: str,
    caption: str,
    values: Callable[[Sequence[TimedCompletion]], list[float]],
) -> Html:
    found = []
    for run in runs:
        good = [completion for completion in run.done if completion.error is None]
        points = shares([value * 1000 for value in values(good)])
        if points:
            found.append(Series(_name(run.row), points))
    left_out = len(found) - NUM_COLOURS
    note = f" The last {left_out} rows are left out." if left_out > 0 else ""
    shown = found[:NUM_COLOURS]
    return figure(title, caption + note, distribution(shown, x_label="ms"), legend(shown))


def _over(rows: Sequence[BenchRow], attribute: str, figure_name: str) -> list[Series]:
    """Return a line for each prompt length; of chats, whose prompts grow, one for all."""
    name: Callable[[BenchRow], str] = (
        (lambda _: "all chats") if attribute == "turn" else (lambda row: f"{row.input_tokens} in")
    )
    ordered = sorted(rows, key=lambda row: (row.input_tokens, getattr(row, attribute)))
    return [
        Series(
            label, [(getattr(row, attribute), getattr(row, figure_name) or 0.0) for row in group]
        )
        for label, group in groupby(ordered, key=name)
    ]


def _tiers(tiers: Sequence[TierRow]) -> Html:
    return table(
        ["engines", "cache tier", "hits"],
        ([text(tier.role), text(tier.tier), text(f"{tier.hit_share:.1%}")] for tier in tiers),
        words=[0, 1],
    )


def _timelines(runs: Sequence[BenchRun]) -> Iterator[Html]:
    for run in runs:
        bars = [_bar(completion, run.start_at, run.row.seconds) for completion in run.done]
        yield figure(
            _name(run.row),
            "Each bar is a request: the wait for its first token, then its other tokens."
            + (" Red: it failed." if run.row.num_errors else ""),
            timeline(bars),
            _NO_LEGEND,
            wide=True,
        )


def _bar(completion: TimedCompletion, start_at: float, seconds: float) -> Bar:
    begin_s = max(0.0, completion.start_at - start_at)
    if completion.error is not None or not completion.tokens_at:
        # When it failed nobody has noted; its last sign of life is shown, or a mark.
        last_at = max(completion.tokens_at, default=completion.start_at + seconds / 100)
        return Bar(begin_s, None, max(begin_s, last_at - start_at))
    return Bar(begin_s, completion.tokens_at[0] - start_at, completion.tokens_at[-1] - start_at)


def _table(rows: Sequence[BenchRow]) -> Html:
    columns = {
        name: heading
        for name, heading in _COLUMNS.items()
        if any(getattr(row, name) is not None for row in rows)
    }
    return table(
        ["prompt", "load", *columns.values()],
        (
            [text(f"{row.input_tokens:,}"), text(row.load)]
            + [text(_number(getattr(row, name))) for name in columns]
            for row in rows
        ),
        words=[1],
    )


def _notes(rows: Sequence[BenchRow]) -> Html:
    """Return what the figures mean, and how often what went wrong."""
    said = ["Times are milliseconds as clients see them; gap: first to second token."]
    kinds: dict[str, int] = {}
    for row in rows:
        for error in without_words(row.errors):
            count, _, kind = error.partition(" x ")
            kinds[kind] = kinds.get(kind, 0) + int(count)
    said += [f"{count} requests failed: {kind}." for kind, count in kinds.items()]
    left_out = sum(row.num_left_out for row in rows)
    if left_out:
        said.append(f"{left_out} requests of the trace were too long for the model and left out.")
    return Html(f'<p class="note">{text(" ".join(said))}</p>')


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{0 if value >= 1000 else 2}f}"
