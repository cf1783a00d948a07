"""``pdlaunch bench``: measure a deployment as its clients see it, or pulls of KV blocks alone."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
import typer
from rich.console import Console

from pdlaunch.api import launched
from pdlaunch.bench.serve import (
    FIRST_TOKEN_ID,
    BenchOptions,
    BenchRun,
    ShowProgress,
    bench_serve,
    read_trace_file,
    without_words,
)
from pdlaunch.bench.timed_completion import Goals, read_goals
from pdlaunch.cli import EXIT_INTERRUPTED, EXIT_UNUSABLE
from pdlaunch.cli.flags import ServeCommand, refuse_address, with_serve_flags
from pdlaunch.cli.html_report import HEADINGS, write_report
from pdlaunch.cli.output import (
    FormatOption,
    counted,
    fitting,
    print_errors,
    print_json,
    print_line,
    print_table,
)
from pdlaunch.cli.status import duration
from pdlaunch.config.connectors import KVPath, MooncakeProtocol
from pdlaunch.config.settings import flag_name
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError, PdlaunchError

app = typer.Typer(no_args_is_help=True)

_TRANSFER_HEADINGS = {
    "path": "path",
    "num_blocks": "blocks",
    "megabytes": "MB",
    "read_gb_per_s": "READ\nGB/s",
    "unverified_gb_per_s": "unverified\npull GB/s",
    "overhead_us": "beyond\nREAD us",
    "pull_gb_per_s": "verified\npull GB/s",
    "checksum_percent": "checksums\n%",
}
# Columns that a narrow terminal leaves out, in this order
_SPARE = (
    *("tpot_ms_median", "cached_share", "seconds", "e2e_ms_median", "first_gap_ms_p99"),
    *("requests_per_s", "itl_ms_p99", "ttft_ms_p99", "num_requests"),
)


def _list_of(kind: Any, example: str) -> Callable[[str], Any]:
    """Return a parser of lists such as ``1,4,16``."""

    def read(text: str) -> Any:
        try:
            return msgspec.convert(text.split(","), kind, strict=False)
        except msgspec.ValidationError as error:
            what = f"is not a list of positive numbers such as {example}"
            raise typer.BadParameter(f"{text!r} {what}: {error}") from None

    return read


_integers = _list_of(list[Annotated[int, msgspec.Meta(gt=0)]], "1,4,16")
_numbers = _list_of(list[Annotated[float, msgspec.Meta(gt=0, lt=1e9)]], "0.5,2,8")


def read_slo(text: str) -> Goals:
    """Read the goals of ``--slo``."""
    try:
        return read_goals(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


# Options with a parser are annotated ``Any``: typer would take a list for a repeated option.
@app.command("serve", cls=ServeCommand, short_help="Measure what clients of a deployment see.")
@with_serve_flags
def serve(
    config: Path | None = None,
    url: str | None = typer.Option(
        None, help="URL of a running deployment; without it, a deployment is started."
    ),
    input_tokens: Any = typer.Option(
        None, parser=_integers, metavar="N,N", help="Prompt lengths (128)."
    ),
    output_tokens: int | None = typer.Option(None, min=1, help="Output length (32)."),
    concurrency: Any = typer.Option(
        None, parser=_integers, metavar="N,N", help="Concurrent requests (1,4,16)."
    ),
    request_rate: Any = typer.Option(
        None,
        parser=_numbers,
        metavar="R,R",
        help="Requests sent per second, such as 0.5,2,8, instead of --concurrency.",
    ),
    burstiness: float | None = typer.Option(
        None,
        min=0.001,
        help="Shape of the pauses at --request-rate: 1 is Poisson, below 1 is bursty (1).",
    ),
    num_requests: int | None = typer.Option(
        None, min=1, help="Requests for each length and concurrency (four rounds, at least 8)."
    ),
    max_token_id: int = typer.Option(
        30_000, min=FIRST_TOKEN_ID + 1, help="Prompts are random token ids from 100 up to this."
    ),
    seed: int | None = typer.Option(
        None, help="Seed of the prompts. The same seed twice finds warm prefix caches."
    ),
    slo: Any = typer.Option(
        None,
        parser=read_slo,
        metavar="GOALS",
        help="Goals of a request, for goodput, in ms: ttft=200,itl=50 (ITL: p99 in a request); "
        "also tpot, e2e.",
    ),
    trace: Path | None = typer.Option(
        None,
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Send the requests of this file, a trace in Mooncake's format (JSON lines).",
    ),
    trace_speed: float | None = typer.Option(
        None, min=0.001, help="Factor by which the trace is sent faster (1)."
    ),
    report: Path | None = typer.Option(
        None, metavar="FILE", dir_okay=False, help="Write plots and figures as one HTML file."
    ),
    output: FormatOption = "table",
    *,
    flags: dict[str, object],
) -> None:
    """Measure what clients see: TTFT, gap to the second token, ITL and throughput."""
    # Refuse options without an effect, so that users do not misread the figures.
    if request_rate is not None:
        refuse_given({"--concurrency": concurrency}, "not with --request-rate")
    else:
        refuse_given({"--burstiness": burstiness}, "only with --request-rate")
    if trace is None:
        refuse_given({"--trace-speed": trace_speed}, "only with --trace")
    else:
        of_trace = {"--input-tokens": input_tokens, "--output-tokens": output_tokens}
        of_trace |= {"--concurrency": concurrency, "--request-rate": request_rate}
        refuse_given(of_trace, "not with --trace, which has lengths and times")
    if url is None:
        refuse_address(flags)
    else:
        given = {flag_name(path): value for path, value in flags.items() if path != "api_key"}
        why = "only without --url, for a deployment that this command starts"
        refuse_given({"CONFIG": config} | given, why)
    runs: list[BenchRun] = []
    goals = slo or Goals()
    with _reported_errors() as failures:
        loaded = load_config(config, os.environ, flags)
        key = loaded.config.api_key
        asked = {
            **{"input_tokens": input_tokens, "output_tokens": output_tokens, "seed": seed},
            **{"request_rates": request_rate, "burstiness": burstiness},
            **{"concurrencies": () if request_rate else concurrency, "trace_speed": trace_speed},
            **{"num_requests": num_requests, "max_token_id": max_token_id, "goals": goals},
        }
        options = BenchOptions(
            api_key=None if key is None else key.get_secret_value(),
            trace=[] if trace is None else read_trace_file(trace)[:num_requests],
            **{name: value for name, value in asked.items() if value is not None},
        )
        with contextlib.ExitStack() as stack:
            shown = Console(stderr=True).status("starting the deployment")
            progress = stack.enter_context(shown).update
            if url is None:
                deployment = stack.enter_context(launched(loaded))
                url = deployment.url
                if output == "table":
                    typer.echo(f"command to healthy: {deployment.start_s:.1f} s")
            # Runs are appended one by one, so that Ctrl-C keeps the complete rows.
            asyncio.run(_collect(msgspec.structs.replace(options, url=url), progress, runs))
            progress("stopping the deployment")
    if runs:
        if report is not None:
            failures.append(write_report(report, runs, goals))
        _show(runs, output)
        print_errors([error for run in runs for error in run.row.errors])
        failures.append(int(any(run.row.num_errors for run in runs)))
    raise typer.Exit(max(failures, default=0))


@contextlib.contextmanager
def _reported_errors() -> Any:
    """Print an error or Ctrl-C, and continue after the block with the rows so far. Yields exit
    codes.
    """
    codes: list[int] = []
    try:
        yield codes
    except PdlaunchError as error:
        print_errors([error])
        codes.append(EXIT_UNUSABLE if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        print_errors(["interrupted"])
        codes.append(EXIT_INTERRUPTED)


async def _collect(options: BenchOptions, progress: ShowProgress, runs: list[BenchRun]) -> None:
    async for run in bench_serve(options, progress):
        runs.append(run)  # noqa: PERF401 - runs before an error or Ctrl-C are shown


def _show(runs: Sequence[BenchRun], output: str) -> None:
    rows = [run.row for run in runs]
    found: list[dict[str, Any]] = [msgspec.to_builtins(row) for row in rows]
    if output == "json":
        print_json([row | {"errors": without_words(row["errors"])} for row in found])
        return
    shown = [name for name in HEADINGS if any(row[name] is not None for row in found)]
    headings, console = {name: HEADINGS[name] for name in shown}, Console()
    if console.is_terminal:
        headings = fitting(found, headings, console.width, _SPARE)
    print_table(found, headings)
    if num_hidden := len(shown) - len(headings):
        print_line(f"{counted(num_hidden, 'column')} left out: --format json shows all")
    if rows[-1].routes:
        print_line(f"routes of the last load: {', '.join(map(str, rows[-1].routes))}")
    seconds, num_requests = sum(row.seconds for row in rows), sum(row.num_requests for row in rows)
    left_out = sum(row.num_left_out for row in rows)
    note = f"; {left_out} of the trace left out, too long for the model" if left_out else ""
    print_line(
        f"in all: {counted(num_requests, 'request')}, "
        f"{counted(sum(row.num_errors for row in rows), 'error')}, "
        f"{sum(row.total_prompt_tokens for row in rows)} prompt and "
        f"{sum(row.total_output_tokens for row in rows)} output tokens in {duration(seconds)}; "
        f"{num_requests / seconds:.2f} requests/s; times in ms{note}"
    )


def refuse_given(options: Mapping[str, object], why: str) -> None:
    """Raise typer's BadParameter if any of these options (name -> value) was given."""
    if given := [name for name, value in options.items() if value is not None]:
        raise typer.BadParameter(f"{', '.join(given)}: {why}")


def _paths(text: str) -> list[str]:
    known = (*get_args(KVPath), "mooncake", "file")
    for name in text.split(","):
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return text.split(",")


@app.command("transfer", short_help="Measure pulls of KV blocks alone.")
def transfer(
    paths: Any = typer.Option(
        "auto",
        "--path",
        parser=_paths,
        metavar="PATHS",
        help="Some of auto,nixl,p2p (connector nixl), mooncake, file.",
    ),
    num_blocks: Any = typer.Option(
        "16,128", parser=_integers, metavar="N,N", help="Blocks in one pull."
    ),
    num_repeats: int = typer.Option(10, min=1, help="Pulls measured; the median is shown."),
    num_layers: int = typer.Option(30, min=1, help="Layers of the model."),
    num_kv_heads: int = typer.Option(3, min=1, help="KV heads of the model."),
    head_dim: int = typer.Option(64, min=1, help="Size of a head of the model."),
    block_size: int = typer.Option(16, min=1, help="Tokens in a KV block."),
    dtype: Literal["float32", "bfloat16", "float16"] = typer.Option(
        "float32", help="Precision of the KV cache."
    ),
    device: Literal["cpu", "cuda"] = typer.Option("cpu", help="Where to measure."),
    enable_cumem_allocator: bool = typer.Option(
        False, "--enable-cumem-allocator", help="Allocate KV caches on a GPU from CuMem pools."
    ),
    mooncake_protocol: MooncakeProtocol = typer.Option("tcp", help="How Mooncake moves bytes."),
    output: FormatOption = "table",
) -> None:
    """Measure GB/s from a prefill rank to a decode rank: READs alone, and whole pulls without and
    with checksums. The defaults have the shape of the demo model.
    """
    # Names are those of the fields of ``TransferOptions``, whose module imports torch.
    options = {name: value for name, value in locals().items() if name != "output"}
    if enable_cumem_allocator and device != "cuda":
        raise typer.BadParameter("--enable-cumem-allocator is for --device cuda")
    rows = json.loads(run_module("pdlaunch.bench.transfer", json.dumps(options)))
    if output == "json":
        print_json(rows)
    else:
        print_table(rows, _TRANSFER_HEADINGS)


def run_module(
    module: str,
    *arguments: str,
    stdout: int = subprocess.PIPE,
    environ: Mapping[str, str] | None = None,
) -> bytes:
    """Run ``python -m MODULE ARGUMENTS``, so that torch is not imported here, and return its
    output. Raises ``typer.Exit`` if it fails.
    """
    # -P: do not import a folder named pdlaunch in the current folder.
    guard = "pdlaunch.protocol.process.bootstrap"  # ends the module with this process
    command = [sys.executable, "-P", "-m", guard, module, *arguments]
    # Ctrl-C does not reach a process in its own session. It ends silently, with this process.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=stdout, env=environ, start_new_session=True
    ) as process:
        # Standard input stays open, because the process ends with its standard input.
        found = b"" if process.stdout is None else process.stdout.read()
        if process.wait() != 0:
            raise typer.Exit(1)
    return found
