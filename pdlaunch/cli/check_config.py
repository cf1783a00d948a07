"""``pdlaunch check-config``: find what is wrong with a set-up before it runs."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.checks.context import Probes
from pdlaunch.checks.probes import probe_files, probe_ports
from pdlaunch.checks.run import Report, run_checks
from pdlaunch.cli import EXIT_FAILED, EXIT_UNUSABLE
from pdlaunch.cli.findings import (
    github_line,
    github_problem,
    print_table,
    problems_json,
    report_json,
    safe,
)
from pdlaunch.cli.flags import ConfigArgument, with_serve_flags
from pdlaunch.cli.preflight import probe_transport
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.problems import InvalidConfigError, Problem
from pdlaunch.config.sizes import parse_size
from pdlaunch.config.sources import load_config
from pdlaunch.engines.plan import kind_of
from pdlaunch.errors import ConfigError
from pdlaunch.platform.availability import probe_imports
from pdlaunch.platform.facts import Machine
from pdlaunch.platform.probe import assume, probe_machine
from pdlaunch.resolve.resolve import THIS_HOST, resolve
from pdlaunch.resolve.roles import count_ranks

MAX_ASSUMED_GPUS = 1024

Format = Literal["table", "json", "github"]
Platform = Literal["cuda", "cpu"]


@with_serve_flags
def check_config(
    config: ConfigArgument = None,
    output: Annotated[Format, typer.Option("--format", help="How findings are printed.")] = "table",
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help=(
                "Also start the planned processes and move bytes between them (with random "
                "weights; takes a launch)."
            ),
        ),
    ] = False,
    assume_platform: Annotated[
        Platform | None,
        typer.Option("--assume-platform", help="Check for such a machine instead of this one."),
    ] = None,
    assume_gpus: Annotated[
        int | None,
        typer.Option(
            "--assume-gpus", metavar="N", min=1, max=MAX_ASSUMED_GPUS, help="Number of its GPUs."
        ),
    ] = None,
    assume_gpu_memory: Annotated[
        str | None,
        typer.Option("--assume-gpu-memory", metavar="SIZE", help="Memory of each, such as 80GiB."),
    ] = None,
    *,
    flags: dict[str, object],
) -> None:
    """Check a deployment without starting it. The exit code is 0 when it is clean, 1 with findings,
    2 when the input is unusable.
    """
    try:
        loaded = load_config(config, os.environ, flags)
        machine = assumed_machine(
            probe_machine(), loaded.config, assume_platform, assume_gpus, assume_gpu_memory
        )
    except ConfigError as error:
        _refuse(error, output, config)
    is_this = assume_platform is None and assume_gpus is None and assume_gpu_memory is None
    resolved = resolve(loaded.config, {THIS_HOST: machine}, os.environ)
    probes = Probes(import_errors=probe_imports(os.environ) if probe else None)
    if is_this:
        files = probe_files(resolved)
        probes = replace(
            probes,
            ports=probe_ports(resolved),
            connector_errors=files.connector_errors,
            folder_problems=files.folder_problems,
            weight_errors=files.weight_errors,
        )
    report = run_checks(resolved, loaded.origins, probes, rules=kind_of(resolved).rules())
    if probe and is_this and report.is_ok():
        # Only a set-up without errors can start.
        probes = replace(probes, transport=probe_transport(resolved))
        report = run_checks(resolved, loaded.origins, probes, rules=kind_of(resolved).rules())
    ok = report.is_ok(strict=strict)
    _print(report, output, ok=ok)
    raise typer.Exit(0 if ok else EXIT_FAILED)


def assumed_machine(
    machine: Machine,
    config: LaunchConfig,
    platform: Platform | None,
    num_gpus: int | None,
    gpu_memory: str | None,
) -> Machine:
    """``machine``, or what is assumed instead. Raises ConfigError for assumptions that contradict
    each other.
    """
    if platform is None and num_gpus is None and gpu_memory is None:
        return machine
    if platform == "cpu":
        if num_gpus is not None or gpu_memory is not None:
            raise ConfigError(
                "--assume-platform cpu has no GPUs",
                fix="leave out --assume-gpus and --assume-gpu-memory",
            )
        return assume(machine, num_gpus=0, gpu_memory_bytes=None)
    gpus = num_gpus or len(machine.gpus) or min(max(count_ranks(config), 1), MAX_ASSUMED_GPUS)
    return assume(machine, num_gpus=gpus, gpu_memory_bytes=_memory_bytes(gpu_memory))


def _memory_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ConfigError(f"--assume-gpu-memory: {error}") from None
    if size <= 0:
        raise ConfigError("--assume-gpu-memory: must be more than 0")
    return size


def _print(report: Report, output: Format, *, ok: bool) -> None:
    match output:
        case "json":
            typer.echo(report_json(report, ok=ok))
        case "github":
            for finding in report.findings:
                typer.echo(github_line(finding))
        case "table":
            print_table(Console(), report, ok=ok)


def _refuse(error: ConfigError, output: Format, path: Path | None) -> NoReturn:
    """Print why the input is unusable: on stderr, and on stdout in the form of ``output``."""
    found = (
        error.problems
        if isinstance(error, InvalidConfigError)
        else (Problem(str(error), error.field, fix=error.fix),)
    )
    if output == "json":
        typer.echo(problems_json(found))
    elif output == "github":
        for problem in found:
            typer.echo(github_problem(problem, None if path is None else str(path)))
    errors = Console(file=sys.stderr, soft_wrap=True)
    for problem in found:
        errors.print(Text(f"error: {safe(str(problem))}", style="red"))
    raise typer.Exit(EXIT_UNUSABLE)
