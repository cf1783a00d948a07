"""``pdlaunch bench serve``: measure a deployment as its clients see it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import typer
from rich.console import Console

from pdlaunch.bench.serve.loads import FIRST_TOKEN_ID, BenchOptions, read_trace_file
from pdlaunch.bench.serve.rows import BenchRun, vllm_result, without_words
from pdlaunch.bench.serve.sweep import (
    MultiTurnOptions,
    MultiTurnReport,
    ProgressText,
    bench_multi_turn,
    bench_serve,
)
from pdlaunch.bench.serve.timed_completion import Goals, read_goals
from pdlaunch.cli import EXIT_INTERRUPTED, EXIT_UNUSABLE
from pdlaunch.cli.flags import option, with_arguments, with_serve_flags
from pdlaunch.cli.html_report import bench_page, write_report
from pdlaunch.cli.output import print_errors, print_json, print_table
from pdlaunch.cli.own_deployment import own_deployment, refuse_address
from pdlaunch.cli.status import duration
from pdlaunch.config.settings import flag_name
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError, PdlaunchError

ServeFormat = Literal["table", "json", "vllm"]

_HEADINGS = {
    "turn": "turn",
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
    "cached_share": "cached",
    "pull_ms_mean": "pull\nmean",
    "kv_megabytes_mean": "KV\nMB",
    "seconds": "took\ns",
    "requests_per_s": "reqs\n/s",
    "output_tokens_per_s": "tokens\n/s",
    "goodput_per_s": "good\n/s",
    "good_share": "good\nshare",
    "first_gap_goal_ms": "gap\ngoal",
    "step_output_tokens_per_s": "step\nallows",
    "of_step_share": "share\nof it",
}
_TIER_HEADINGS = {"role": "engines", "tier": "cache tier", "hit_share": "hits"}


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """Holds the options of the command as they were given."""

    url: str | None = option(None, "URL of a running deployment; without it one is started.")
    input_tokens: str | None = option(None, "Prompt length, one or several: 128,2000,8000 (128).")
    output_tokens: int | None = option(None, "Output length (32).", min=1)
    concurrency: str | None = option(
        None, "Requests at a time, one or several (1,4,16; 4 with --multi-turn)."
    )
    num_requests: int | None = option(
        None, "Requests for each length and concurrency (four rounds, at least 8).", min=1
    )
    max_token_id: int = option(
        30_000, "Prompts are random token ids from 100 up to this.", min=FIRST_TOKEN_ID + 1
    )
    seed: int | None = option(
        None, "Seed of the prompts; the same one twice meets warm prefix caches."
    )
    bare_gb_per_s: str | None = option(
        None, "Speed of a bare transfer for these prompts; shows the goal of the gap."
    )
    step_ms: str | None = option(
        None, "Decode step in ms at these concurrencies; shows the share of what it allows."
    )
    multi_turn: bool = option(False, "Measure chats whose messages repeat what was said.")
    conversations: int | None = option(None, "Number of chats (16).", min=1)
    turns: int | None = option(None, "Messages of each chat (4).", min=1)
    turn_tokens: int | None = option(
        None, "Length of a message after the first, which has --input-tokens (32).", min=1
    )
    request_rate: str | None = option(
        None, "Requests sent a second, one or several (0.5,2,8), instead of --concurrency."
    )
    burstiness: float | None = option(
        None, "Shape of the pauses at --request-rate: 1 is Poisson, less comes in bursts (1)."
    )
    slo: str | None = option(
        None,
        "Goals of a request, for goodput: ttft=200,itl=50 (ms); also tpot, e2e.",
        metavar="GOALS",
    )
    trace: Path | None = option(
        None,
        "Send the requests of this file: Mooncake's JSONL, or conversations.",
        metavar="FILE",
        exists=True,
        dir_okay=False,
    )
    trace_speed: float | None = option(None, "Times by which the trace is sent faster (1).")
    report: Path | None = option(
        None, "Write plots and figures as one HTML file.", metavar="FILE", dir_okay=False
    )
    format: ServeFormat = option(
        "table", "How to print what was found; vllm: as its `bench serve`."
    )


@with_serve_flags
@with_arguments(ServeArguments)
def serve(
    config: Path | None = None, *, arguments: ServeArguments, flags: dict[str, object]
) -> None:
    """Measure time to first token, gap to the second, inter-token latency and throughput of a
    deployment, as its clients see them.
    """
    options = _read_chats(arguments) if arguments.multi_turn else _read_rows(arguments)
    if arguments.url is None:
        refuse_address(flags)
    else:
        own = {flag_name(path): value for path, value in flags.items() if path != "api_key"}
        why = "for a deployment that is started here, not for one at --url"
        _refuse_given({"CONFIG": config} | own, why)
    raise typer.Exit(_measure(options, arguments, config, flags))


def _measure(
    options: BenchOptions | MultiTurnOptions,
    arguments: ServeArguments,
    config: Path | None,
    flags: dict[str, object],
) -> int:
    """Measure, show the figures, and return the exit code, which is 0 only if nothing went wrong.

    What was measured before an error or Ctrl-C is shown too.
    """
    runs: list[BenchRun] = []
    chats: MultiTurnReport | None = None
    start_s: float | None = None
    code = 0
    try:
        launch_config = load_config(config, os.environ, flags).config
        key = launch_config.api_key.get_secret_value() if launch_config.api_key else None
        running: Any = contextlib.nullcontext()
        if arguments.url is None:
            running = own_deployment(config, flags, launch_config)
        starting = Console(stderr=True).status("starting the deployment")
        with starting as status, running as deployment:
            start_s = None if deployment is None else deployment.start_s
            url = arguments.url if deployment is None else deployment.url
            match msgspec.structs.replace(options, url=url, api_key=key):
                case BenchOptions() as of_rows:
                    asyncio.run(_collect(of_rows, status.update, runs))
                case MultiTurnOptions() as of_chats:
                    chats = asyncio.run(bench_multi_turn(of_chats, status.update, runs.append))
            status.update("stopping the deployment")
    except PdlaunchError as error:
        print_errors([error])
        code = EXIT_UNUSABLE if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print_errors(["interrupted"])
        code = EXIT_INTERRUPTED
    if start_s is not None and arguments.format == "table":
        typer.echo(f"command to healthy: {start_s:.1f} s")
    if not runs:
        return code
    if arguments.report is not None:
        tiers = chats.tiers if chats is not None else []
        page = bench_page(runs, options.goals, tiers)
        code = max(code, write_report(arguments.report, page))
    _show(runs, chats, arguments.format)
    print_errors([error for run in runs for error in run.row.errors])
    return max(code, int(any(run.row.num_errors for run in runs)))


async def _collect(options: BenchOptions, progress: ProgressText, runs: list[BenchRun]) -> None:
    async for run in bench_serve(options, progress):
        runs.append(run)  # noqa: PERF401 - those before an error or Ctrl-C are shown


def _show(runs: Sequence[BenchRun], chats: MultiTurnReport | None, output: ServeFormat) -> None:
    """Print what was measured; ``chats``: whose turns the runs are."""
    found: list[dict[str, Any]] = [msgspec.to_builtins(run.row) for run in runs]
    if output == "vllm":
        for run in runs:
            # A line each, as `vllm bench serve --append-result` writes them.
            typer.echo(msgspec.json.encode(vllm_result(run)).decode())
    elif output == "json":
        rows = [row | {"errors": without_words(row["errors"])} for row in found]
        print_json(rows if chats is None else msgspec.to_builtins(chats) | {"turns": rows})
    else:
        shown = {
            name: text
            for name, text in _HEADINGS.items()
            if any(row[name] is not None for row in found)
        }
        print_table(found, shown)
        typer.echo(_totals(runs))
        if chats is not None:
            if chats.tiers:
                print_table(msgspec.to_builtins(chats.tiers), _TIER_HEADINGS)
            typer.echo(
                f"{chats.num_conversations} conversations of {chats.working_set_tokens} tokens in "
                f"all, --seed {chats.seed}"
            )


def _totals(runs: Sequence[BenchRun]) -> str:
    """Return what all rows add up to."""
    rows = [run.row for run in runs]
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


# Options that go with others alone are refused: one without an effect would make people trust a
# figure that it did not shape.
def _read_chats(given: ServeArguments) -> MultiTurnOptions:
    of_rows = {
        "--num-requests": given.num_requests,
        "--bare-gb-per-s": given.bare_gb_per_s,
        "--step-ms": given.step_ms,
        "--request-rate": given.request_rate,
        "--trace": given.trace,
    }
    _refuse_given(of_rows, "not for --multi-turn")
    lengths = read_numbers(given.input_tokens or "128", "--input-tokens")
    numbers = read_numbers(given.concurrency or "4", "--concurrency")
    if len(lengths) + len(numbers) > 2:
        raise typer.BadParameter("--multi-turn takes one --input-tokens and one --concurrency")
    return MultiTurnOptions(
        num_conversations=given.conversations or 16,
        num_turns=given.turns or 4,
        first_tokens=lengths[0],
        turn_tokens=given.turn_tokens or 32,
        output_tokens=given.output_tokens or 32,
        concurrency=numbers[0],
        max_token_id=given.max_token_id,
        seed=given.seed,
        goals=_read_slo(given.slo),
    )


def _read_rows(given: ServeArguments) -> BenchOptions:
    of_chats = {
        "--conversations": given.conversations,
        "--turns": given.turns,
        "--turn-tokens": given.turn_tokens,
    }
    _refuse_given(of_chats, "only for --multi-turn")
    if given.request_rate is not None:
        _refuse_given({"--concurrency": given.concurrency}, "not with --request-rate")
    else:
        _refuse_given({"--burstiness": given.burstiness}, "only with --request-rate")
    if given.trace is None:
        _refuse_given({"--trace-speed": given.trace_speed}, "only with --trace")
    else:
        of_trace = {"--input-tokens": given.input_tokens, "--output-tokens": given.output_tokens}
        _refuse_given(of_trace, "not with --trace, which has them")
    lengths = read_numbers(given.input_tokens or "128", "--input-tokens")
    wanted = given.concurrency or ("" if given.trace or given.request_rate else "1,4,16")
    numbers = read_numbers(wanted, "--concurrency") if wanted else []
    try:
        trace = [] if given.trace is None else read_trace_file(given.trace)[: given.num_requests]
    except ConfigError as error:
        print_errors([error])
        raise typer.Exit(EXIT_UNUSABLE) from None
    return BenchOptions(
        request_rates=_read_floats(given.request_rate, "--request-rate"),
        burstiness=_read_positive(given.burstiness, "--burstiness"),
        goals=_read_slo(given.slo),
        trace=trace,
        trace_speed=_read_positive(given.trace_speed, "--trace-speed"),
        input_tokens=lengths,
        output_tokens=given.output_tokens or 32,
        concurrencies=numbers,
        num_requests=given.num_requests,
        max_token_id=given.max_token_id,
        seed=given.seed,
        bare_gb_per_s=_read_each(given.bare_gb_per_s, lengths, "--bare-gb-per-s"),
        step_ms=_read_each(given.step_ms, numbers, "--step-ms"),
    )


def _refuse_given(options: Mapping[str, object], why: str) -> None:
    """Raise typer's BadParameter where one of these options, by name, was given."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(f"{', '.join(given)}: {why}")


def _read_slo(text: str | None) -> Goals:
    try:
        return Goals() if text is None else read_goals(text)
    except ValueError as error:
        raise _refused("--slo", str(error)) from None


def read_numbers(text: str, option: str) -> list[int]:
    """Read ``1,4,16``. Raises typer's BadParameter."""
    numbers = _read_floats(text, option, "1,4,16")
    if not all(number.is_integer() for number in numbers):
        raise _refused(option, f"{text!r} is not a list of positive numbers such as 1,4,16")
    return [int(number) for number in numbers]


def _read_floats(text: str | None, option: str, example: str = "0.5,2,8") -> list[float]:
    if text is None:
        return []
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [0.0]
    if not all(0 < number < math.inf for number in numbers):
        raise _refused(option, f"{text!r} is not a list of positive numbers such as {example}")
    return numbers


def _read_positive(number: float | None, option: str) -> float:
    if number is not None and not number > 0:
        raise _refused(option, f"{number:g} is not above 0")
    return 1.0 if number is None else number


def _read_each(text: str | None, keys: Collection[int], option: str) -> dict[int, float]:
    """Read ``4.9,6.2``: one number for each key, or one for all. Empty for None."""
    try:
        numbers = _read_floats(text, option)
    except typer.BadParameter:
        numbers = [0.0]
    if len(numbers) == 1 and numbers[0]:
        numbers *= len(keys)
    if text is not None and (len(numbers) != len(keys) or 0.0 in numbers):
        wanted = ",".join(map(str, keys))
        raise _refused(
            option, f"{text!r} is neither a positive number nor a list of one for each of {wanted}"
        )
    return dict(zip(keys, numbers, strict=False))


def _refused(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=f"'{option}'")
