"""``pdlaunch bench``: measure a deployment, or an engine's step beside the bare model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pdlaunch.cli.flags import ConfigArgument, to_command_line, with_serve_flags
from pdlaunch.client.bench_serve import BenchOptions, bench_serve
from pdlaunch.client.deployment import running_deployment
from pdlaunch.config.aliases import resolve_model
from pdlaunch.errors import PdlaunchError

app = typer.Typer(no_args_is_help=True)


class Format(StrEnum):
    """How the figures are printed."""

    TABLE = "table"
    JSON = "json"


_SERVE_HEADINGS = {
    "concurrency": "at once",
    "num_requests": "reqs",
    "num_errors": "errs",
    "ttft_ms_median": "TTFT ms",
    "ttft_ms_p99": "p99",
    "itl_ms_median": "ITL ms",
    "itl_ms_p99": "p99",
    "tpot_ms_median": "TPOT ms",
    "output_tokens_per_s": "tokens/s",
}
_TRANSFER_HEADINGS = {
    "connector": "connector",
    "tp_pair": "TP",
    "num_blocks": "blocks",
    "megabytes": "MB",
    "bare_gb_per_s": "bare GB/s",
    "unverified_gb_per_s": "unverified GB/s",
    "pull_gb_per_s": "pull GB/s",
    "ratio": "unverified/bare",
}
_STEP_HEADINGS = {
    "kind": "step",
    "batch_size": "batch",
    "num_tokens": "tokens",
    "bare_ms": "bare ms",
    "engine_ms": "engine ms",
    "ratio": "ratio",
}
FormatOption = Annotated[Format, typer.Option("--format", help="How the figures are printed.")]


@app.command("serve")
@with_serve_flags
def serve(
    config: ConfigArgument = None,
    url: Annotated[str | None, typer.Option(help="A running deployment; without it one is started.")] = None,
    input_tokens: Annotated[int, typer.Option(min=1, help="Prompt length.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Output length.")] = 32,
    concurrency: Annotated[str, typer.Option(help="Requests at a time, one or several: 1,4,16.")] = "1,4,16",
    num_requests: Annotated[int | None, typer.Option(min=1, help="For each concurrency [four rounds, at least 8].")] = None,
    max_token_id: Annotated[int, typer.Option(min=101, help="Prompts are random token ids from 100 up to this.")] = 30_000,
    seed: Annotated[int | None, typer.Option(help="Of the prompts; the same seed twice meets warm prefix caches.")] = None,
    output: FormatOption = Format.TABLE,
    *,
    flags: dict[str, object],
) -> None:
    """Time to first token, inter-token latency and throughput of a deployment, as its clients see them."""
    console = Console(stderr=True)
    try:
        with _target(url, [str(config)] if config else [], flags) as (target, start_s):
            options = BenchOptions(
                url=target,
                api_key=str(flags["api_key"]) if "api_key" in flags else os.environ.get("PDLAUNCH_API_KEY"),
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                num_requests=num_requests,
                max_token_id=max_token_id,
                seed=seed,
            )
            rows = asyncio.run(bench_serve(options, _numbers(concurrency)))
    except PdlaunchError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    if output is Format.TABLE and start_s is not None:
        Console().print(f"command to healthy: {start_s:.1f} s")
    _print([msgspec.to_builtins(row) for row in rows], output, _SERVE_HEADINGS)
    if any(row.num_errors for row in rows):
        raise typer.Exit(1)


@app.command("step")
def step(
    model: Annotated[str, typer.Option(help="Alias or directory in Hugging Face layout.")] = "smollm2",
    batch_sizes: Annotated[str, typer.Option(help="Rows decoded together, one or several.")] = "1,16",
    context_tokens: Annotated[int, typer.Option(min=1, help="Tokens each row has before the step.")] = 144,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt of the prefill rows.")] = 128,
    num_steps: Annotated[int, typer.Option(min=1, help="Steps measured; the median is shown.")] = 20,
    dtype: Annotated[str, typer.Option(help="Precision.")] = "float32",
    num_threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    load_format: Annotated[str, typer.Option(help="`dummy` makes weights up; only config.json is needed.")] = "auto",
    enforce_eager: Annotated[bool, typer.Option(help="On a GPU, decode without CUDA graphs.")] = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """The engine's step beside the same model run by transformers alone."""
    arguments = {
        "model_dir": str(resolve_model(model).cache_dir),
        "batch_sizes": _numbers(batch_sizes),
        "context_tokens": context_tokens,
        "num_steps": num_steps,
        "prefill_tokens": prefill_tokens,
        "dtype": dtype,
        "num_threads": num_threads,
        "device": device,
        "load_format": load_format,
        "enforce_eager": enforce_eager,
    }
    # torch stays out of this process, and its thread pools start with the wanted size.
    command = [sys.executable, "-m", "pdlaunch.engine.bench_step", json.dumps(arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": str(num_threads)}, check=False)
    if result.returncode != 0:
        raise typer.Exit(1)
    _print(json.loads(result.stdout), output, _STEP_HEADINGS)


@app.command("transfer")
def transfer(
    connectors: Annotated[str, typer.Option(help="nixl, mooncake or file, one or several.")] = "nixl",
    tp_pairs: Annotated[str, typer.Option(help="TP sizes of prefill and decode, one or several: 1x1,1x3,3x1.")] = "1x1",
    num_blocks: Annotated[str, typer.Option(help="Blocks of one pull, one or several.")] = "16,128",
    num_repeats: Annotated[int, typer.Option(min=1, help="Pulls measured; the median is shown.")] = 10,
    num_layers: Annotated[int, typer.Option(min=1, help="Of the model [those of smollm2].")] = 30,
    num_kv_heads: Annotated[int, typer.Option(min=1, help="Of the model [those of smollm2].")] = 3,
    head_dim: Annotated[int, typer.Option(min=1, help="Of the model [that of smollm2].")] = 64,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens in a KV block.")] = 16,
    dtype: Annotated[str, typer.Option(help="Precision.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    mooncake_protocol: Annotated[str, typer.Option(help="tcp, rdma or nvlink.")] = "tcp",
    output: FormatOption = Format.TABLE,
) -> None:
    """Gigabytes a second from prefill to decode ranks, beside a bare loop of the connector's library."""
    arguments = {
        "connectors": connectors.split(","),
        "tp_pairs": [_numbers(pair.replace("x", ",")) for pair in tp_pairs.split(",")],
        "num_blocks": _numbers(num_blocks),
        "num_repeats": num_repeats,
        "num_layers": num_layers,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "dtype": dtype,
        "device": device,
        "mooncake_protocol": mooncake_protocol,
    }
    command = [sys.executable, "-m", "pdlaunch.transfer.bench_transfer", json.dumps(arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if result.returncode != 0:
        raise typer.Exit(1)
    _print(json.loads(result.stdout), output, _TRANSFER_HEADINGS)


@contextlib.contextmanager
def _target(url: str | None, config: list[str], flags: dict[str, object]) -> Iterator[tuple[str, float | None]]:
    """The deployment to measure, and how long it took to start when it is ours."""
    if url is not None:
        yield url, None
        return
    arguments, environ = to_command_line(flags)
    with running_deployment([*config, *arguments], environ=os.environ | environ) as deployment:
        yield deployment.url, deployment.start_s


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers such as 1,4,16")
    return numbers


def _print(rows: Sequence[dict[str, Any]], output: Format, headings: Mapping[str, str]) -> None:
    """``headings``: the columns of the table by field; JSON has every field."""
    if output is Format.JSON:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(rows)).decode() + "\n")
        return
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in headings.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(_short(row[field]) for field in headings))
    Console().print(table)
    for row in rows:
        for error in row.get("errors", []):
            Console(stderr=True).print(f"error: {error}", style="red", markup=False)


def _short(value: object) -> str:
    """Numbers to three digits or more: 0.95, 53.1, 4330."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
