"""Prints what ``pdlaunch bench serve`` has measured: tables, JSON, or lines as vLLM writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import typer

from pdlaunch.bench.serve.multi_turn import MultiTurnReport
from pdlaunch.bench.serve.progress import duration
from pdlaunch.bench.serve.row import BenchRow, BenchRun, without_words
from pdlaunch.bench.serve.vllm_result import vllm_result
from pdlaunch.cli.output import print_errors, print_json, print_table

ServeFormat = Literal["table", "json", "vllm"]

_LOAD_HEADINGS = {
    "input_tokens": "in",
    "concurrency": "at\nonce",
    "request_rate": "rate\n/s",
}
_HEADINGS = {
    "num_requests": "reqs",
    "num_errors": "errs",
    "ttft_ms_median": "TTFT\nmedian",
    "ttft_ms_p99": "TTFT\np99",
    "first_gap_ms_median": "gap\nmedian",
    "first_gap_ms_p99": "gap\np99",
    "itl_ms_median": "ITL\nmedian",
    "itl_ms_p99": "ITL\np99",
    "tpot_ms_median": "TPOT\nmedian",
    "pull_ms_mean": "pull\nmean",
    "kv_megabytes_mean": "KV\nMB",
    "seconds": "took\ns",
    "requests_per_s": "reqs\n/s",
    "output_tokens_per_s": "tokens\n/s",
}
_GOAL_HEADINGS = {"goodput_per_s": "good\n/s", "good_share": "good\nshare"}
_LIMIT_HEADINGS = {
    "first_gap_goal_ms": "gap\ngoal",
    "step_output_tokens_per_s": "step\nallows",
    "of_step_share": "share\nof it",
}
_OPTIONAL = _LOAD_HEADINGS | _GOAL_HEADINGS | _LIMIT_HEADINGS
_TURN_HEADINGS = {
    "turn": "turn",
    "prompt_tokens": "prompt",
    "num_requests": "reqs",
    "num_errors": "errs",
    "ttft_ms_median": "TTFT ms",
    "ttft_ms_p99": "p99",
    "itl_ms_median": "ITL ms",
    "cached_share": "cached",
    "output_tokens_per_s": "tokens/s",
    "goodput_per_s": "good/s",
    "good_share": "good share",
}
_TIER_HEADINGS = {"role": "engines", "tier": "cache tier", "hit_share": "hits"}


def show_runs(runs: Sequence[BenchRun], output: ServeFormat) -> int:
    """Print what was measured; return the exit code, which is 0 only without an error."""
    rows = [run.row for run in runs]
    found = [msgspec.to_builtins(row) for row in rows]
    if output == "json":
        print_json([row | {"errors": without_words(row["errors"])} for row in found])
    elif output == "vllm":
        for run in runs:
            # A line each, as `vllm bench serve --append-result` writes them.
            typer.echo(msgspec.json.encode(vllm_result(run)).decode())
    else:
        shown = _LOAD_HEADINGS | _HEADINGS | _GOAL_HEADINGS | _LIMIT_HEADINGS
        print_table(found, _measured(found, shown))
        typer.echo(_totals(rows))
    print_errors([error for row in rows for error in row.errors])
    return int(any(row.num_errors for row in rows))


def _measured(rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str]) -> dict[str, str]:
    """Return the columns without those that have no figure because nobody asked for it."""
    return {
        name: text
        for name, text in headings.items()
        if name not in _OPTIONAL or any(row[name] is not None for row in rows)
    }


def _totals(rows: Sequence[BenchRow]) -> str:
    """Return what all rows add up to."""
    seconds = sum(row.seconds for row in rows)
    num_requests = sum(row.num_requests for row in rows)
    left_out = sum(row.num_left_out for row in rows)
    note = f"; {left_out} of the trace are too long for the model and left out" if left_out else ""
    return (
        f"in all: {num_requests} requests, {sum(row.num_errors for row in rows)} errors, "
        f"{sum(row.total_prompt_tokens for row in rows)} prompt and "
        f"{sum(row.total_output_tokens for row in rows)} output tokens in {duration(seconds)}; "
        f"{num_requests / seconds:.2f} requests/s; times in ms{note}"
    )


def show_chats(report: MultiTurnReport, runs: Sequence[BenchRun], output: ServeFormat) -> int:
    """Print the turns of chats, whose requests are ``runs``; return the exit code, which is 0 only
    without an error.
    """
    if output == "json":
        print_json(
            msgspec.structs.replace(
                report,
                turns=[
                    msgspec.structs.replace(row, errors=without_words(row.errors))
                    for row in report.turns
                ],
            )
        )
    elif output == "vllm":
        return show_runs(runs, output)
    else:
        turns, tiers = msgspec.to_builtins(report.turns), msgspec.to_builtins(report.tiers)
        print_table(turns, _measured(turns, _TURN_HEADINGS))
        if tiers:
            print_table(tiers, _TIER_HEADINGS)
        typer.echo(
            f"{report.num_conversations} conversations of {report.working_set_tokens} tokens in "
            f"all, --seed {report.seed}"
        )
    print_errors([error for row in report.turns for error in row.errors])
    return int(any(row.num_errors for row in report.turns))
