"""``pdlaunch bench serve``: measure a deployment as its clients see it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from pdlaunch.bench.serve.goals import Goals, read_goals
from pdlaunch.bench.serve.loads import FIRST_TOKEN_ID, BenchOptions
from pdlaunch.bench.serve.multi_turn import MultiTurnOptions, MultiTurnReport, bench_multi_turn
from pdlaunch.bench.serve.progress import ProgressText
from pdlaunch.bench.serve.row import BenchRun
from pdlaunch.bench.serve.sweep import bench_serve
from pdlaunch.bench.serve.traces import TraceRequest, read_trace_file
from pdlaunch.cli import EXIT_INTERRUPTED, EXIT_UNUSABLE
from pdlaunch.cli.bench_serve_tables import ServeFormat, show_chats, show_runs
from pdlaunch.cli.bench_values import read_decimals, read_numbers, read_positive, read_rates
from pdlaunch.cli.flags import with_serve_flags
from pdlaunch.cli.output import print_errors
from pdlaunch.cli.own_deployment import own_deployment, refuse_address
from pdlaunch.cli.report.bench import bench_page
from pdlaunch.cli.report.page import write_report
from pdlaunch.config.settings import flag_name
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError, PdlaunchError


@with_serve_flags
def serve(
    config: Path | None = None,
    url: Annotated[
        str | None, typer.Option(help="URL of a running deployment; without it one is started.")
    ] = None,
    input_tokens: Annotated[
        str | None, typer.Option(help="Prompt length, one or several: 128,2000,8000 (128).")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Output length (32).", show_default=False)
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(help="Requests at a time, one or several (1,4,16; 4 with --multi-turn)."),
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(
            min=1, help="Requests for each length and concurrency (four rounds, at least 8)."
        ),
    ] = None,
    max_token_id: Annotated[
        int,
        typer.Option(
            min=FIRST_TOKEN_ID + 1, help="Prompts are random token ids from 100 up to this."
        ),
    ] = 30_000,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the prompts; the same one twice meets warm prefix caches."),
    ] = None,
    bare_gb_per_s: Annotated[
        str | None,
        typer.Option(
            help="Bare speed for these prompts from `bench transfer`; shows the goal of the gap."
        ),
    ] = None,
    step_ms: Annotated[
        str | None,
        typer.Option(
            help=(
                "Decode step at these concurrencies, of `bench step`: shows the share of what it "
                "allows."
            )
        ),
    ] = None,
    multi_turn: Annotated[
        bool,
        typer.Option(
            "--multi-turn", help="Measure chats whose messages repeat all that was said before."
        ),
    ] = False,
    conversations: Annotated[
        int | None, typer.Option(min=1, help="Number of chats (16).", show_default=False)
    ] = None,
    turns: Annotated[
        int | None, typer.Option(min=1, help="Messages of each chat (4).", show_default=False)
    ] = None,
    turn_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of a message after the first, which has --input-tokens (32)."
        ),
    ] = None,
    request_rate: Annotated[
        str | None,
        typer.Option(
            help="Requests sent a second, one or several (0.5,2,8), instead of --concurrency."
        ),
    ] = None,
    burstiness: Annotated[
        float | None,
        typer.Option(
            help="Shape of the pauses at --request-rate: 1 is Poisson, less comes in bursts (1).",
            show_default=False,
        ),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            help="Goals of a request, for goodput: ttft=200,itl=50 (ms); also tpot, e2e.",
            metavar="GOALS",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Send the requests of this file: Mooncake's JSONL, or conversations.",
            metavar="FILE",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    trace_speed: Annotated[
        float | None,
        typer.Option(help="Times by which the trace is sent faster (1).", show_default=False),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write plots and figures as one HTML file.", metavar="FILE", dir_okay=False
        ),
    ] = None,
    output: Annotated[
        ServeFormat,
        typer.Option("--format", help="How to print what was found; vllm: as its `bench serve`."),
    ] = "table",
    *,
    flags: dict[str, object],
) -> None:
    """Measure time to first token, gap to the second, inter-token latency and throughput of a
    deployment, as its clients see them.
    """
    lengths = read_numbers(input_tokens or "128", "--input-tokens")
    by_clients = not (trace or request_rate)
    usual = "4" if multi_turn else "1,4,16" if by_clients else ""
    wanted = concurrency or usual
    numbers = read_numbers(wanted, "--concurrency") if wanted else []
    options: BenchOptions | MultiTurnOptions
    if multi_turn:
        of_rows = {
            "--num-requests": num_requests,
            "--bare-gb-per-s": bare_gb_per_s,
            "--step-ms": step_ms,
            "--request-rate": request_rate,
            "--trace": trace,
        }
        # An option without an effect would make people trust a figure that it did not shape.
        _refuse(of_rows, "not for --multi-turn")
        if len(lengths) + len(numbers) > 2:
            raise typer.BadParameter("--multi-turn takes one --input-tokens and one --concurrency")
        options = MultiTurnOptions(
            num_conversations=conversations or 16,
            num_turns=turns or 4,
            first_tokens=lengths[0],
            turn_tokens=turn_tokens or 32,
            output_tokens=output_tokens or 32,
            concurrency=numbers[0],
            max_token_id=max_token_id,
            seed=seed,
            goals=_read_slo(slo),
        )
    else:
        _refuse(
            {"--conversations": conversations, "--turns": turns, "--turn-tokens": turn_tokens},
            "only for --multi-turn",
        )
        if request_rate is not None:
            _refuse({"--concurrency": concurrency}, "not with --request-rate")
        else:
            _refuse({"--burstiness": burstiness}, "only with --request-rate")
        if trace is None:
            _refuse({"--trace-speed": trace_speed}, "only with --trace")
        else:
            lengths_of_trace = {"--input-tokens": input_tokens, "--output-tokens": output_tokens}
            _refuse(lengths_of_trace, "not with --trace, which has them")
        options = BenchOptions(
            request_rates=read_rates(request_rate, "--request-rate"),
            burstiness=read_positive(burstiness, "--burstiness"),
            goals=_read_slo(slo),
            trace=_read_trace(trace, num_requests),
            trace_speed=read_positive(trace_speed, "--trace-speed"),
            input_tokens=lengths,
            output_tokens=output_tokens or 32,
            concurrencies=numbers,
            num_requests=num_requests,
            max_token_id=max_token_id,
            seed=seed,
            bare_gb_per_s=read_decimals(bare_gb_per_s, lengths, "--bare-gb-per-s"),
            step_ms=read_decimals(step_ms, numbers, "--step-ms"),
        )
    if url is not None:
        own = {"CONFIG": config} | {
            flag_name(path): value for path, value in flags.items() if path != "api_key"
        }
        _refuse(own, "for a deployment that is started here, not for one at --url")
    else:
        refuse_address(flags)
    raise typer.Exit(_measure(options, url, config, flags, output, report))


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


def _measure(
    options: BenchOptions | MultiTurnOptions,
    url: str | None,
    config: Path | None,
    flags: dict[str, object],
    output: ServeFormat,
    report: Path | None,
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
        running = (
            contextlib.nullcontext()
            if url is not None
            else own_deployment(config, flags, launch_config)
        )
        with (
            Console(stderr=True).status("starting the deployment") as status,
            running as deployment,
        ):
            start_s = None if deployment is None else deployment.start_s
            target = url if deployment is None else deployment.url
            match msgspec.structs.replace(options, url=target, api_key=key):
                case BenchOptions() as serve_options:
                    asyncio.run(_collect(serve_options, status.update, runs))
                case MultiTurnOptions() as chat_options:
                    chats = asyncio.run(bench_multi_turn(chat_options, status.update, runs.append))
            status.update("stopping the deployment")
    except PdlaunchError as error:
        print_errors([error])
        code = 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print_errors(["interrupted"])
        code = EXIT_INTERRUPTED
    if start_s is not None and output == "table":
        typer.echo(f"command to healthy: {start_s:.1f} s")
    if runs and report is not None:
        tiers = chats.tiers if chats is not None else []
        code = max(code, write_report(report, "--report", bench_page(runs, options.goals, tiers)))
    if chats is not None:
        return max(code, show_chats(chats, runs, output))
    return max(code, show_runs(runs, output)) if runs else code


async def _collect(options: BenchOptions, progress: ProgressText, runs: list[BenchRun]) -> None:
    async for run in bench_serve(options, progress):
        runs.append(run)  # noqa: PERF401 - those before an error or Ctrl-C are shown


def _refuse(options: Mapping[str, object], why: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(f"{', '.join(given)}: {why}")
