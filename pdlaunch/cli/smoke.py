"""``pdlaunch smoke``: start a deployment, check what it promises, stop it, print a verdict."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.bench.chaos import chaos_environment, smoke_under_chaos
from pdlaunch.cli import EXIT_INTERRUPTED, EXIT_UNUSABLE
from pdlaunch.cli.flags import with_serve_flags
from pdlaunch.cli.output import print_errors, safe
from pdlaunch.cli.own_deployment import own_deployment, refuse_address
from pdlaunch.cli.report.page import write_report
from pdlaunch.cli.report.smoke import smoke_page
from pdlaunch.config.sources import load_config
from pdlaunch.errors import ConfigError, PdlaunchError
from pdlaunch.launch.client.deployment import Deployment
from pdlaunch.launch.client.smoke import Check, smoke, write_junit
from pdlaunch.machine.probe import probe_machine
from pdlaunch.planning.resolve import THIS_HOST, resolve
from pdlaunch.planning.role_engines import RoleEngines


@with_serve_flags
def smoke_command(
    config: Path | None = None,
    junit: Annotated[
        Path | None,
        typer.Option(help="Write the checks as JUnit XML.", metavar="FILE", dir_okay=False),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write the checks as one HTML file.", metavar="FILE", dir_okay=False),
    ] = None,
    chaos: Annotated[
        int | None,
        typer.Option(
            help="Inject faults into the KV transfers, drawn from this seed, and kill a rank.",
            metavar="SEED",
        ),
    ] = None,
    *,
    flags: dict[str, object],
) -> None:
    """Start the deployment, compare its tokens with those of one engine alone, stop it.

    The exit code is 1 when a check failed.
    """
    refuse_address(flags)
    try:
        launch_config = load_config(config, os.environ, flags).config
    except ConfigError as error:
        Console(stderr=True, soft_wrap=True).print(Text(safe(f"error: {error}"), style="red"))
        raise typer.Exit(EXIT_UNUSABLE) from None
    key = launch_config.api_key.get_secret_value() if launch_config.api_key else None
    checks: list[Check] = []
    checked: dict[str, object] = {"Model": launch_config.model}
    try:
        faults: dict[str, str] = {}
        if chaos is not None:
            faults = chaos_environment(chaos, launch_config.kv_transfer.connector)
            flags = flags | {"kv_transfer.connector": "faulty"}
        with own_deployment(config, flags, launch_config, faults) as deployment:
            checks.append(Check("the deployment gets ready", round(deployment.start_s, 3)))
            # Known before the stop, to see afterwards whether one of them is left.
            children = psutil.Process(deployment.process.pid).children(recursive=True)
            # Only now: a model that had to be converted can be read.
            resolved = resolve(launch_config, {THIS_HOST: probe_machine()}, os.environ)
            exact = {engines.dtype for engines in resolved.roles.values()} == {"float32"}
            checked |= {
                "Engines": ", ".join(_described(engines) for engines in resolved.roles.values()),
                "Connector": launch_config.kv_transfer.connector,
                "Faults": "none" if chaos is None else f"drawn from seed {chaos}",
            }
            if chaos is None:
                checks += smoke(deployment.url, api_key=key, exact=exact)
            else:
                checks += smoke_under_chaos(deployment, chaos, api_key=key, exact=exact)
            checks.append(_stop(deployment, children))
    except PdlaunchError as error:
        checks.append(
            Check(
                "the deployment can be checked" if checks else "the deployment gets ready",
                0.0,
                str(error),
            )
        )
    except KeyboardInterrupt:
        print_errors(["interrupted"])
        raise typer.Exit(EXIT_INTERRUPTED) from None
    num_failed = _print_checks(checks)
    is_written = junit is None or _write(checks, junit)
    if report is not None:
        is_written &= not write_report(report, "--report", smoke_page(checks, checked))
    failed, passed = f"{num_failed} of {len(checks)} checks failed", f"{len(checks)} checks passed"
    Console().print(Text(f"smoke: {failed if num_failed else passed}"))
    raise typer.Exit(0 if is_written and not num_failed else 1)


def _print_checks(checks: list[Check]) -> int:
    """Print a line for each check, and why it failed; return how many did."""
    console = Console()
    num_failed = 0
    for check in checks:
        mark, style = ("ok", "green") if check.failure is None else ("FAILED", "bold red")
        console.print(
            Text.assemble((f"{mark:>6}", style), f"  {check.name} ({check.seconds:.1f} s)"),
            soft_wrap=True,
        )
        if check.failure is not None:
            num_failed += 1
            console.print(Text(safe(f"        {check.failure}")), soft_wrap=True)
    return num_failed


def _described(engines: RoleEngines) -> str:
    """Return what the engines of a role are: ``1 prefill (float32, cpu, TP 1)``."""
    kind = f"{engines.dtype}, {engines.device}, TP {engines.tp_size}"
    return f"{engines.replicas} {engines.role} ({kind})"


def _write(checks: list[Check], path: Path) -> bool:
    try:
        write_junit(checks, path)
    except OSError as error:
        message = f"error: --junit {path} cannot be written: {error.strerror or error}"
        Console(stderr=True, soft_wrap=True).print(Text(message, style="red"))
        return False
    return True


def _stop(deployment: Deployment, children: list[psutil.Process]) -> Check:
    """Check that SIGTERM ends the deployment with code 0 and leaves no process."""
    start_at = time.monotonic()
    try:
        code = deployment.stop()
        left = [
            str(child)
            for child in children
            if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
        ]
        failure = f"exit code {code}" if code else f"still running: {left}" if left else None
    except PdlaunchError as error:
        failure = str(error)
    return Check(
        "the deployment stops and leaves no process", round(time.monotonic() - start_at, 3), failure
    )
