"""``pdlaunch smoke``: start a deployment, check what it promises, stop it, print a verdict."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator
from pathlib import Path

import psutil
import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.api import launched
from pdlaunch.cli import EXIT_INTERRUPTED
from pdlaunch.cli.flags import refuse_address, with_serve_flags
from pdlaunch.cli.output import ending_at_errors, print_errors, safe
from pdlaunch.config.sources import LoadedConfig, load_config
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.deployment import Deployment
from pdlaunch.launch.client.smoke import Check, smoke
from pdlaunch.machine.probe import probe_machine
from pdlaunch.planning.resolve import THIS_HOST, resolve


@with_serve_flags
def smoke_command(config: Path | None = None, *, flags: dict[str, object]) -> None:
    """Start the deployment, compare its tokens with those of one engine alone, stop it.

    The exit code is 1 when a check failed.
    """
    refuse_address(flags)
    with ending_at_errors():
        loaded = load_config(config, os.environ, flags)
    checks: list[Check] = []
    try:
        with contextlib.closing(_run(loaded)) as run:
            for check in run:
                checks.append(check)
                _print_check(check)
    except PdlaunchError as error:
        done = "can be checked" if checks else "gets ready"
        checks.append(Check(f"the deployment {done}", 0.0, str(error)))
        _print_check(checks[-1])
    except KeyboardInterrupt:
        print_errors(["interrupted"])
        raise typer.Exit(EXIT_INTERRUPTED) from None
    num_failed = sum(check.failure is not None for check in checks)
    verdict = f"{num_failed} of {len(checks)} checks failed"
    Console().print(Text(f"smoke: {verdict if num_failed else f'{len(checks)} checks passed'}"))
    raise typer.Exit(int(num_failed > 0))


def _run(loaded: LoadedConfig) -> Generator[Check]:
    """Yield each check when it is done. Raises PdlaunchError."""
    key = loaded.config.api_key
    api_key = None if key is None else key.get_secret_value()
    with launched(loaded) as deployment:
        yield Check("the deployment gets ready", round(deployment.start_s, 3))
        # Known before the stop, to see afterwards whether one of them is left.
        children = psutil.Process(deployment.process.pid).children(recursive=True)
        # Only now: a model that had to be converted can be read.
        roles = resolve(loaded.config, {THIS_HOST: probe_machine()}, os.environ).roles.values()
        exact = {engines.dtype for engines in roles} == {"float32"}
        yield from smoke(deployment.url, api_key=api_key, exact=exact)
        yield _stop(deployment, children)


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
    seconds = round(time.monotonic() - start_at, 3)
    return Check("the deployment stops and leaves no process", seconds, failure)


def _print_check(check: Check) -> None:
    """Print a line for the check, and why it failed."""
    console = Console(soft_wrap=True)
    mark, style = ("ok", "green") if check.failure is None else ("FAILED", "bold red")
    console.print(Text.assemble((f"{mark:>6}", style), f"  {check.name} ({check.seconds:.1f} s)"))
    if check.failure is not None:
        console.print(Text(safe(f"        {check.failure}")))
