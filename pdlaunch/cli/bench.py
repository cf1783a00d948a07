"""``pdlaunch bench``: measure a deployment, or one part of it beside what the machine allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import typer

from pdlaunch.cli.bench_serve import serve
from pdlaunch.cli.bench_values import (
    read_name,
    read_names,
    read_numbers,
    read_pairs,
    read_size,
    read_sizes,
)
from pdlaunch.cli.flags import with_flags
from pdlaunch.cli.output import Format, FormatOption, print_errors, print_json, print_table
from pdlaunch.cli.serve_command import ServeCommand
from pdlaunch.config.connectors import KVPath, MooncakeProtocol
from pdlaunch.config.model_files.aliases import resolve_model
from pdlaunch.config.sizes import format_size
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError

app = typer.Typer(no_args_is_help=True)
app.command("serve", cls=ServeCommand)(serve)

STDERR = 2
"""File descriptor."""
_CONNECTORS: tuple[str, ...] = ("nixl", "mooncake", "file")
_PATHS: tuple[str, ...] = get_args(KVPath)
_AUTO: KVPath = "auto"
Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "float16"]
_MOONCAKE_PROTOCOLS: tuple[str, ...] = get_args(MooncakeProtocol)
_TRANSFER_HEADINGS = {
    "connector": "connector",
    "path": "path",
    "tp_pair": "TP",
    "num_blocks": "blocks",
    "megabytes": "MB",
    "read_gb_per_s": "READ\nGB/s",
    "bare_gb_per_s": "bare, by\nturns",
    "read_ratio": "READ\n/bare",
    "bare_loop_gb_per_s": "bare\nloop",
    "read_loop_ratio": "READ\n/loop",
    "unverified_gb_per_s": "unverified\npull GB/s",
    "pull_ratio": "pull\n/bare",
    "overhead_us": "beyond\nREAD us",
    "pull_gb_per_s": "verified\npull GB/s",
    "checksum_percent": "checksums\n%",
}
_STEP_HEADINGS = {
    "kind": "step",
    "batch_size": "batch",
    "num_tokens": "tokens",
    "bare_ms": "bare ms",
    "engine_ms": "engine ms",
    "ratio": "ratio",
    "floor_ms": "memory floor ms",
    "floor_ratio": "engine/floor",
}
_OFFLOAD_HEADINGS = {
    "block": "block",
    "chunk": "chunk",
    "load_method": "H2D by",
    "store_method": "D2H by",
    "both_methods": "both by",
    "h2d_gb_per_s": "H2D\nGB/s",
    "d2h_gb_per_s": "D2H\nGB/s",
    "both_gb_per_s": "both\nGB/s",
    "handler_both_gb_per_s": "handler,\nboth GB/s",
    "h2d_decode_slowdown_share": "decode slower\nby, beside H2D",
    "d2h_decode_slowdown_share": "D2H",
    "both_decode_slowdown_share": "both",
}


@app.command("step")
@with_flags("load_format", "enforce_eager", "max_cudagraph_capture_size")
def step(
    model: Annotated[
        str, typer.Option(help="Alias or directory in Hugging Face layout.")
    ] = "smollm2",
    batch_sizes: Annotated[
        str, typer.Option(help="Rows decoded together, one or several.")
    ] = "1,16",
    context_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens each row has before the step.")
    ] = 144,
    prefill_tokens: Annotated[
        str, typer.Option(help="Prompt lengths of the prefill rows, one or several.")
    ] = "128",
    chunk_tokens: Annotated[
        str | None,
        typer.Option(
            help="Prompt tokens computed beside each batch, one or several; none by default."
        ),
    ] = None,
    chunk_behind: Annotated[
        int, typer.Option(min=0, help="Tokens of that prompt that are there already.")
    ] = 0,
    num_steps: Annotated[
        int, typer.Option(min=1, help="Steps measured; the median is shown.")
    ] = 20,
    dtype: Annotated[
        Precision, typer.Option(help="Precision of weights and KV cache.")
    ] = "float32",
    num_threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens in a KV block.")] = 16,
    device: Annotated[Device, typer.Option(help="Where to measure.")] = "cpu",
    output: FormatOption = "table",
    *,
    flags: dict[str, object],
) -> None:
    """Time the engine's step beside the same model run by transformers alone, and beside the floor
    that memory sets.
    """
    settings = _engine_settings(flags)
    arguments = {
        "model_dir": _model_dir(model),
        "batch_sizes": read_numbers(batch_sizes, "--batch-sizes"),
        "context_tokens": context_tokens,
        "num_steps": num_steps,
        "prefill_tokens": read_numbers(prefill_tokens, "--prefill-tokens"),
        "chunk_tokens": read_numbers(chunk_tokens, "--chunk-tokens") if chunk_tokens else [],
        "chunk_behind": chunk_behind,
        "dtype": dtype,
        "num_threads": num_threads,
        "block_size": block_size,
        "device": device,
        **settings,
    }
    # Thread pools start with the wanted size.
    rows = _measure("step", arguments, {"OMP_NUM_THREADS": str(num_threads)})
    _print(rows, output, _STEP_HEADINGS)
    if output == "table":
        typer.echo(
            f"memory floor: bytes that a step must move, at the {rows[0]['memory_gb_per_s']:g} "
            "GB/s measured in this run"
        )


@app.command("offload")
def offload(
    block_sizes: Annotated[
        str, typer.Option(help="Bytes of a KV block, one or several; multiples of 4KiB.")
    ] = ("4KiB,16KiB,64KiB,256KiB,1MiB"),
    memory: Annotated[
        str | None,
        typer.Option(
            help="Bytes copied in each direction (1GiB; 32MiB on a CPU), twice that on the host."
        ),
    ] = None,
    device: Annotated[
        Device | None, typer.Option(help="Where the KV cache lies (cuda if there is one).")
    ] = None,
    output: FormatOption = "table",
) -> None:
    """Time copies of scattered blocks between device and host memory, beside one copy of everything
    in the same run.
    """
    arguments: dict[str, object] = {"block_sizes": read_sizes(block_sizes, "--block-sizes")}
    if memory is not None:
        arguments["num_bytes"] = read_size(memory, "--memory")
    if device is not None:
        arguments["device"] = device
    report = _measure("offload", arguments)
    if output == "json":
        print_json(report)
        return
    limit = dict.fromkeys(_OFFLOAD_HEADINGS) | report["limit"] | {"block": "one copy"}
    rows = [dict.fromkeys(_OFFLOAD_HEADINGS) | _offload_sizes(row) | row for row in report["rows"]]
    print_table([*rows, limit], _OFFLOAD_HEADINGS)
    typer.echo(f"{report['device']}, {format_size(report['num_bytes'])} in each direction")


def _offload_sizes(row: dict[str, Any]) -> dict[str, str]:
    return {name: format_size(row[f"{name}_bytes"]) for name in ("block", "chunk")}


@app.command("transfer")
def transfer(
    connectors: Annotated[
        str, typer.Option(help=f"{', '.join(_CONNECTORS)}: one or several.")
    ] = "nixl",
    path: Annotated[
        str, typer.Option(help=f"{', '.join(_PATHS)}: one or several, of connector nixl.")
    ] = _AUTO,
    tp_pairs: Annotated[
        str, typer.Option(help="TP sizes of prefill and decode, one or several: 1x1,1x3,3x1.")
    ] = "1x1",
    num_blocks: Annotated[str, typer.Option(help="Blocks of one pull, one or several.")] = "16,128",
    num_repeats: Annotated[
        int, typer.Option(min=1, help="Pulls measured; the median is shown.")
    ] = 10,
    num_layers: Annotated[
        int, typer.Option(min=1, help="Layers of the model; smollm2's by default.")
    ] = 30,
    num_kv_heads: Annotated[
        int, typer.Option(min=1, help="KV heads of the model; smollm2's by default.")
    ] = 3,
    head_dim: Annotated[
        int, typer.Option(min=1, help="Size of a head of the model; smollm2's by default.")
    ] = 64,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens in a KV block.")] = 16,
    dtype: Annotated[
        Precision, typer.Option(help="Precision of weights and KV cache.")
    ] = "float32",
    device: Annotated[Device, typer.Option(help="Where to measure.")] = "cpu",
    enable_cumem_allocator: Annotated[
        bool, typer.Option(help="Allocate KV caches on a GPU from CuMem pools.")
    ] = False,
    mooncake_protocol: Annotated[
        str, typer.Option(help=f"{', '.join(_MOONCAKE_PROTOCOLS)}.")
    ] = "tcp",
    output: FormatOption = "table",
) -> None:
    """Measure gigabytes a second from prefill to decode ranks, beside the connector's library by
    itself.
    """
    names = read_names(connectors, _CONNECTORS, "--connectors")
    if path != _AUTO and "nixl" not in names:
        raise typer.BadParameter(
            f"{path!r} is for connector nixl, which is not measured", param_hint="'--path'"
        )
    if enable_cumem_allocator and device != "cuda":
        raise typer.BadParameter(
            f"cumem allocator is not supported on the current platform: --device is {device}; take "
            "--device cuda, or leave the flag out",
            param_hint="'--enable-cumem-allocator'",
        )
    arguments = {
        "connectors": names,
        "paths": read_names(path, _PATHS, "--path"),
        "tp_pairs": read_pairs(tp_pairs, "--tp-pairs"),
        "num_blocks": read_numbers(num_blocks, "--num-blocks"),
        "num_repeats": num_repeats,
        "num_layers": num_layers,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "dtype": dtype,
        "device": device,
        "enable_cumem_allocator": enable_cumem_allocator,
        "mooncake_protocol": read_name(
            mooncake_protocol, _MOONCAKE_PROTOCOLS, "--mooncake-protocol"
        ),
    }
    _print(_measure("transfer", arguments), output, _TRANSFER_HEADINGS)


def run_module(
    module: str,
    *arguments: str,
    environ: Mapping[str, str] | None = None,
    stdout: int = subprocess.PIPE,
) -> bytes:
    """Run ``python -m MODULE ARGUMENTS`` and return what it writes to the pipe.

    What measures runs in a process of its own, which keeps torch out of this one.

    Raises ``typer.Exit`` when it fails.
    """
    # -P: a folder named pdlaunch where the user stands is not the installed one.
    command = [sys.executable, "-P", "-m", "pdlaunch.protocol.process.guarded", module, *arguments]
    # In a session of its own Ctrl-C does not reach it: it ends with this process, silently.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=stdout,
        env=os.environ | (environ or {}),
        start_new_session=True,
    ) as process:
        # Standard input stays open: its end is the end of the process.
        found = b"" if process.stdout is None else process.stdout.read()
        if process.wait() != 0:
            raise typer.Exit(1)
    return found


def _engine_settings(flags: dict[str, object]) -> dict[str, object]:
    """Return the settings that were given, with values that an engine takes."""
    try:
        settings = load_config(None, {}, flags).config.engine_settings("decode")
    except ConfigError as error:
        print_errors([error])
        raise typer.Exit(2) from None
    return {name: getattr(settings, name) for name in flags}


def _model_dir(model: str) -> str:
    """Return the folder of a model, which is converted first if it has to be."""
    try:
        resolved = resolve_model(model)
    except ConfigError as error:
        print_errors([error])
        raise typer.Exit(2) from None
    if not resolved.ready:
        # Standard output is for the figures.
        run_module("pdlaunch.engine.models.convert", model, stdout=STDERR)
    return str(resolved.cache_dir)


def _measure(kind: str, arguments: dict[str, object], environ: dict[str, str] | None = None) -> Any:
    """Return what ``python -m pdlaunch.bench KIND JSON`` prints."""
    return json.loads(run_module("pdlaunch.bench", kind, json.dumps(arguments), environ=environ))


def _print(rows: list[dict[str, Any]], output: Format, headings: dict[str, str]) -> None:
    if output == "json":
        print_json(rows)
    else:
        print_table(rows, headings)
