"""Declares what ``pdlaunch bench serve`` is asked to measure, and reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pdlaunch.bench.serve.goals import Goals, read_goals
from pdlaunch.bench.serve.loads import FIRST_TOKEN_ID, BenchOptions
from pdlaunch.bench.serve.multi_turn import MultiTurnOptions
from pdlaunch.bench.serve.traces import TraceRequest, read_trace_file
from pdlaunch.cli import EXIT_UNUSABLE
from pdlaunch.cli.bench_serve_tables import ServeFormat
from pdlaunch.cli.bench_values import read_decimals, read_numbers, read_positive, read_rates
from pdlaunch.cli.output import print_errors
from pdlaunch.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeArguments:
    """Holds the options of the command as they were given."""

    url: Annotated[
        str | None, typer.Option(help="URL of a running deployment; without it one is started.")
    ] = None
    input_tokens: Annotated[
        str | None, typer.Option(help="Prompt length, one or several: 128,2000,8000 (128).")
    ] = None
    output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Output length (32).", show_default=False)
    ] = None
    concurrency: Annotated[
        str | None,
        typer.Option(help="Requests at a time, one or several (1,4,16; 4 with --multi-turn)."),
    ] = None
    num_requests: Annotated[
        int | None,
        typer.Option(
            min=1, help="Requests for each length and concurrency (four rounds, at least 8)."
        ),
    ] = None
    max_token_id: Annotated[
        int,
        typer.Option(
            min=FIRST_TOKEN_ID + 1, help="Prompts are random token ids from 100 up to this."
        ),
    ] = 30_000
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the prompts; the same one twice meets warm prefix caches."),
    ] = None
    bare_gb_per_s: Annotated[
        str | None,
        typer.Option(
            help="Bare speed for these prompts from `bench transfer`; shows the goal of the gap."
        ),
    ] = None
    step_ms: Annotated[
        str | None,
        typer.Option(
            help=("Decode step in ms at these concurrencies: shows the share of what it allows.")
        ),
    ] = None
    multi_turn: Annotated[
        bool,
        typer.Option(
            "--multi-turn", help="Measure chats whose messages repeat all that was said before."
        ),
    ] = False
    conversations: Annotated[
        int | None, typer.Option(min=1, help="Number of chats (16).", show_default=False)
    ] = None
    turns: Annotated[
        int | None, typer.Option(min=1, help="Messages of each chat (4).", show_default=False)
    ] = None
    turn_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of a message after the first, which has --input-tokens (32)."
        ),
    ] = None
    request_rate: Annotated[
        str | None,
        typer.Option(
            help="Requests sent a second, one or several (0.5,2,8), instead of --concurrency."
        ),
    ] = None
    burstiness: Annotated[
        float | None,
        typer.Option(
            help="Shape of the pauses at --request-rate: 1 is Poisson, less comes in bursts (1).",
            show_default=False,
        ),
    ] = None
    slo: Annotated[
        str | None,
        typer.Option(
            help="Goals of a request, for goodput: ttft=200,itl=50 (ms); also tpot, e2e.",
            metavar="GOALS",
        ),
    ] = None
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Send the requests of this file: Mooncake's JSONL, or conversations.",
            metavar="FILE",
            exists=True,
            dir_okay=False,
        ),
    ] = None
    trace_speed: Annotated[
        float | None,
        typer.Option(help="Times by which the trace is sent faster (1).", show_default=False),
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write plots and figures as one HTML file.", metavar="FILE", dir_okay=False
        ),
    ] = None
    output: Annotated[
        ServeFormat,
        typer.Option("--format", help="How to print what was found; vllm: as its `bench serve`."),
    ] = "table"


def read_options(given: ServeArguments) -> BenchOptions | MultiTurnOptions:
    """Return what is to be measured. Raises typer's BadParameter and Exit.

    Options that go with others alone are refused: one without an effect would make people trust a
    figure that it did not shape.
    """
    return _read_chats(given) if given.multi_turn else _read_rows(given)


def _read_chats(given: ServeArguments) -> MultiTurnOptions:
    of_rows = {
        "--num-requests": given.num_requests,
        "--bare-gb-per-s": given.bare_gb_per_s,
        "--step-ms": given.step_ms,
        "--request-rate": given.request_rate,
        "--trace": given.trace,
    }
    refuse_given(of_rows, "not for --multi-turn")
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
    refuse_given(of_chats, "only for --multi-turn")
    if given.request_rate is not None:
        refuse_given({"--concurrency": given.concurrency}, "not with --request-rate")
    else:
        refuse_given({"--burstiness": given.burstiness}, "only with --request-rate")
    if given.trace is None:
        refuse_given({"--trace-speed": given.trace_speed}, "only with --trace")
    else:
        of_trace = {"--input-tokens": given.input_tokens, "--output-tokens": given.output_tokens}
        refuse_given(of_trace, "not with --trace, which has them")
    lengths = read_numbers(given.input_tokens or "128", "--input-tokens")
    usual = "" if given.trace or given.request_rate else "1,4,16"
    wanted = given.concurrency or usual
    numbers = read_numbers(wanted, "--concurrency") if wanted else []
    return BenchOptions(
        request_rates=read_rates(given.request_rate, "--request-rate"),
        burstiness=read_positive(given.burstiness, "--burstiness"),
        goals=_read_slo(given.slo),
        trace=_read_trace(given.trace, given.num_requests),
        trace_speed=read_positive(given.trace_speed, "--trace-speed"),
        input_tokens=lengths,
        output_tokens=given.output_tokens or 32,
        concurrencies=numbers,
        num_requests=given.num_requests,
        max_token_id=given.max_token_id,
        seed=given.seed,
        bare_gb_per_s=read_decimals(given.bare_gb_per_s, lengths, "--bare-gb-per-s"),
        step_ms=read_decimals(given.step_ms, numbers, "--step-ms"),
    )


def _read_slo(text: str | None) -> Goals:
    try:
        return Goals() if text is None else read_goals(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--slo'") from None


def _read_trace(path: Path | None, num_requests: int | None) -> list[TraceRequest]:
    """Return the first requests of a trace; none without a file."""
    if path is None:
        return []
    try:
        trace = read_trace_file(path)[:num_requests]
    except ConfigError as error:
        print_errors([error])
        raise typer.Exit(EXIT_UNUSABLE) from None
    return trace


def refuse_given(options: Mapping[str, object], why: str) -> None:
    """Raise typer's BadParameter where one of these options, by name, was given."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(f"{', '.join(given)}: {why}")
