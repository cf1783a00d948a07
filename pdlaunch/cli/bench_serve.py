"""``pdlaunch bench serve``: measure a deployment as its clients see it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import msgspec
import typer
from rich.console import Console

from pdlaunch.bench.serve.loads import BenchOptions
from pdlaunch.bench.serve.multi_turn import MultiTurnOptions, MultiTurnReport, bench_multi_turn
from pdlaunch.bench.serve.progress import ProgressText
from pdlaunch.bench.serve.row import BenchRun
from pdlaunch.bench.serve.sweep import bench_serve
from pdlaunch.cli import EXIT_INTERRUPTED
from pdlaunch.cli.bench_serve_arguments import ServeArguments, read_options, refuse_given
from pdlaunch.cli.bench_serve_tables import show_chats, show_runs
from pdlaunch.cli.flags import with_arguments, with_serve_flags
from pdlaunch.cli.output import print_errors
from pdlaunch.cli.own_deployment import own_deployment, refuse_address
from pdlaunch.cli.report.bench import bench_page
from pdlaunch.cli.report.page import write_report
from pdlaunch.config.settings import flag_name
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError, PdlaunchError


@with_serve_flags
@with_arguments(ServeArguments)
def serve(
    config: Path | None = None, *, arguments: ServeArguments, flags: dict[str, object]
) -> None:
    """Measure time to first token, gap to the second, inter-token latency and throughput of a
    deployment, as its clients see them.
    """
    options = read_options(arguments)
    if arguments.url is not None:
        own = {"CONFIG": config} | {
            flag_name(path): value for path, value in flags.items() if path != "api_key"
        }
        refuse_given(own, "for a deployment that is started here, not for one at --url")
    else:
        refuse_address(flags)
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
    url, report, output = arguments.url, arguments.report, arguments.output
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
