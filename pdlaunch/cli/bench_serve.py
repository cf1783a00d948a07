"""``pdlaunch bench serve``: measure a deployment as its clients see it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from pdlaunch.bench.serve.multi_turn import MultiTurnOptions, MultiTurnReport, bench_multi_turn
from pdlaunch.bench.serve.row import BenchRow
from pdlaunch.bench.serve.sweep import FIRST_TOKEN_ID, BenchOptions, ProgressText, bench_serve
from pdlaunch.cli import EXIT_INTERRUPTED
from pdlaunch.cli.bench_values import read_decimals, read_numbers
from pdlaunch.cli.flags import with_serve_flags
from pdlaunch.cli.output import Format, FormatOption, print_errors, print_json, print_table
from pdlaunch.cli.own_deployment import own_deployment, refuse_address
from pdlaunch.config.settings import flag_name
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError, PdlaunchError

_HEADINGS = {
    "input_tokens": "in",
    "concurrency": "at\nonce",
    "num_requests": "reqs",
    "num_errors": "errs",
    "ttft_ms_median": "TTFT\nms",
    "ttft_ms_p99": "TTFT\np99",
    "first_gap_ms_median": "gap\nms",
    "first_gap_ms_p99": "gap\np99",
    "itl_ms_median": "ITL\nms",
    "itl_ms_p99": "ITL\np99",
    "tpot_ms_median": "TPOT\nms",
    "pull_ms_mean": "pull\nms",
    "kv_megabytes_mean": "KV\nMB",
    "output_tokens_per_s": "tokens\n/s",
}
_LIMIT_HEADINGS = {
    "first_gap_goal_ms": "gap\ngoal",
    "step_output_tokens_per_s": "step\nallows",
    "of_step_share": "share\nof it",
}
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
}
_TIER_HEADINGS = {"role": "engines", "tier": "cache tier", "hit_share": "hits"}


@with_serve_flags
def serve(
    config: Path | None = None,
    url: Annotated[
        str | None, typer.Option(help="URL of a running deployment; without it one is started.")
    ] = None,
    input_tokens: Annotated[
        str, typer.Option(help="Prompt length, one or several: 128,2000,8000.")
    ] = "128",
    output_tokens: Annotated[int, typer.Option(min=1, help="Output length.")] = 32,
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
    output: FormatOption = "table",
    *,
    flags: dict[str, object],
) -> None:
    """Measure time to first token, gap to the second, inter-token latency and throughput of a
    deployment, as its clients see them.
    """
    lengths = read_numbers(input_tokens, "--input-tokens")
    numbers = read_numbers(concurrency or ("4" if multi_turn else "1,4,16"), "--concurrency")
    options: BenchOptions | MultiTurnOptions
    if multi_turn:
        of_rows = {
            "--num-requests": num_requests,
            "--bare-gb-per-s": bare_gb_per_s,
            "--step-ms": step_ms,
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
            output_tokens=output_tokens,
            concurrency=numbers[0],
            max_token_id=max_token_id,
            seed=seed,
        )
    else:
        _refuse(
            {"--conversations": conversations, "--turns": turns, "--turn-tokens": turn_tokens},
            "only for --multi-turn",
        )
        options = BenchOptions(
            input_tokens=lengths,
            output_tokens=output_tokens,
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
    raise typer.Exit(_measure(options, url, config, flags, output))


def _measure(
    options: BenchOptions | MultiTurnOptions,
    url: str | None,
    config: Path | None,
    flags: dict[str, object],
    output: Format,
) -> int:
    """Measure, show the figures, and return the exit code, which is 0 only if nothing went wrong.

    What was measured before an error or Ctrl-C is shown too.
    """
    rows: list[BenchRow] = []
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
                    asyncio.run(_collect(serve_options, status.update, rows))
                case MultiTurnOptions() as chat_options:
                    chats = asyncio.run(bench_multi_turn(chat_options, status.update))
            status.update("stopping the deployment")
    except PdlaunchError as error:
        print_errors([error])
        code = 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print_errors(["interrupted"])
        code = EXIT_INTERRUPTED
    if start_s is not None and output == "table":
        typer.echo(f"command to healthy: {start_s:.1f} s")
    if chats is not None:
        return max(code, _show_chats(chats, output))
    return max(code, _show_rows(rows, output)) if rows else code


async def _collect(options: BenchOptions, progress: ProgressText, rows: list[BenchRow]) -> None:
    async for row in bench_serve(options, progress):
        rows.append(row)  # noqa: PERF401 - those before an error or Ctrl-C are shown


def _show_rows(rows: Sequence[BenchRow], output: Format) -> int:
    found = [msgspec.to_builtins(row) for row in rows]
    if output == "json":
        print_json(found)
    else:
        limits = {
            name: text
            for name, text in _LIMIT_HEADINGS.items()
            if any(row[name] is not None for row in found)
        }
        print_table(found, _HEADINGS | limits)
    print_errors([error for row in rows for error in row.errors])
    return int(any(row.num_errors for row in rows))


def _show_chats(report: MultiTurnReport, output: Format) -> int:
    if output == "json":
        print_json(report)
    else:
        turns, tiers = msgspec.to_builtins(report.turns), msgspec.to_builtins(report.tiers)
        print_table(turns, _TURN_HEADINGS)
        if tiers:
            print_table(tiers, _TIER_HEADINGS)
        typer.echo(
            f"{report.num_conversations} conversations of {report.working_set_tokens} tokens in "
            f"all, --seed {report.seed}"
        )
    print_errors([error for row in report.turns for error in row.errors])
    return int(any(row.num_errors for row in report.turns))


def _refuse(options: Mapping[str, object], why: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(f"{', '.join(given)}: {why}")
