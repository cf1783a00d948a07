"""``pdlaunch bench``: measure a deployment, or pulls of KV blocks alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import typer

from pdlaunch.cli.bench_serve import read_numbers, serve
from pdlaunch.cli.flags import ServeCommand, option, with_arguments
from pdlaunch.cli.output import FormatOption, print_json, print_table
from pdlaunch.config.connectors import KVPath, MooncakeProtocol

app = typer.Typer(no_args_is_help=True)
app.command("serve", cls=ServeCommand)(serve)

_CONNECTORS: tuple[str, ...] = ("nixl", "mooncake", "file")
_PATHS: tuple[str, ...] = get_args(KVPath)
_AUTO: KVPath = "auto"
Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "float16"]
_HEADINGS = {
    "connector": "connector",
    "path": "path",
    "tp_pair": "TP",
    "num_blocks": "blocks",
    "megabytes": "MB",
    "read_gb_per_s": "READ\nGB/s",
    "unverified_gb_per_s": "unverified\npull GB/s",
    "overhead_us": "beyond\nREAD us",
    "pull_gb_per_s": "verified\npull GB/s",
    "checksum_percent": "checksums\n%",
}


@dataclass(frozen=True, kw_only=True)
class TransferArguments:
    """Holds the options of ``bench transfer`` as they were given."""

    connectors: str = option("nixl", f"{', '.join(_CONNECTORS)}: one or several.")
    path: str = option(_AUTO, f"{', '.join(_PATHS)}: one or several, of connector nixl.")
    tp_pairs: str = option("1x1", "TP sizes of prefill and decode, one or several: 1x1,1x3,3x1.")
    num_blocks: str = option("16,128", "Blocks of one pull, one or several.")
    num_repeats: int = option(10, "Pulls measured; the median is shown.", min=1)
    num_layers: int = option(30, "Layers of the model; smollm2's by default.", min=1)
    num_kv_heads: int = option(3, "KV heads of the model; smollm2's by default.", min=1)
    head_dim: int = option(64, "Size of a head of the model; smollm2's by default.", min=1)
    block_size: int = option(16, "Tokens in a KV block.", min=1)
    dtype: Precision = option("float32", "Precision of weights and KV cache.")
    device: Device = option("cpu", "Where to measure.")
    enable_cumem_allocator: bool = option(False, "Allocate KV caches on a GPU from CuMem pools.")
    mooncake_protocol: MooncakeProtocol = option("tcp", "How Mooncake moves bytes.")


@app.command("transfer")
@with_arguments(TransferArguments)
def transfer(output: FormatOption = "table", *, arguments: TransferArguments) -> None:
    """Measure gigabytes a second from prefill to decode ranks: of the READs alone, and of whole
    pulls without and with checksums.
    """
    given = asdict(arguments)
    path, device = given.pop("path"), arguments.device
    names = _read_names(arguments.connectors, _CONNECTORS, "--connectors")
    if path != _AUTO and "nixl" not in names:
        raise _refused("--path", f"{path!r} is for connector nixl, which is not measured")
    if arguments.enable_cumem_allocator and device != "cuda":
        raise _refused(
            "--enable-cumem-allocator",
            f"cumem allocator is not supported on the current platform: --device is {device}; take "
            "--device cuda, or leave the flag out",
        )
    given |= {
        "connectors": names,
        "paths": _read_names(path, _PATHS, "--path"),
        "tp_pairs": _read_pairs(arguments.tp_pairs),
        "num_blocks": read_numbers(arguments.num_blocks, "--num-blocks"),
    }
    rows = json.loads(run_module("pdlaunch.bench", json.dumps(given)))
    if output == "json":
        print_json(rows)
    else:
        print_table(rows, _HEADINGS)


def run_module(module: str, *arguments: str, stdout: int = subprocess.PIPE) -> bytes:
    """Run ``python -m MODULE ARGUMENTS``, which keeps torch out of this process; return its output.

    Raises ``typer.Exit`` when it fails.
    """
    # -P: a folder named pdlaunch where the user stands is not the installed one.
    command = [sys.executable, "-P", "-m", "pdlaunch.protocol.process.guarded", module, *arguments]
    # In a session of its own Ctrl-C does not reach it: it ends with this process, silently.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=stdout, start_new_session=True
    ) as process:
        # Standard input stays open: its end is the end of the process.
        found = b"" if process.stdout is None else process.stdout.read()
        if process.wait() != 0:
            raise typer.Exit(1)
    return found


def _read_names(text: str, known: tuple[str, ...], option: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise _refused(option, f"{name!r} is none of {', '.join(known)}")
    return names


def _read_pairs(text: str) -> list[list[int]]:
    pairs = [re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", part) for part in text.split(",")]
    found = [[int(pair[1]), int(pair[2])] for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        raise _refused("--tp-pairs", f"{text!r} is not a list of pairs such as 1x1,1x3")
    return found


def _refused(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=f"'{option}'")
