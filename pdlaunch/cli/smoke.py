"""``pdlaunch smoke``: start a deployment, check what it promises, stop it, print a verdict."""

from __future__ import annotations

import os
import time
from pathlib import Path
from xml.etree import ElementTree

import psutil
import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.api import launched
from pdlaunch.bench.chaos import faulty_settings, smoke_under_chaos
from pdlaunch.cli import EXIT_INTERRUPTED
from pdlaunch.cli.findings import junit_case, junit_suite
from pdlaunch.cli.flags import refuse_address, with_serve_flags
from pdlaunch.cli.html_report import smoke_page, write_report
from pdlaunch.cli.output import ending_at_errors, print_errors, safe
from pdlaunch.config.sources import LoadedConfig, load_config
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.deployment import Deployment
from pdlaunch.launch.client.smoke import Check, smoke
from pdlaunch.machine.probe import probe_machine
from pdlaunch.planning.resolve import THIS_HOST, resolve


@with_serve_flags
def smoke_command(
    config: Path | None = None,
    junit: Path | None = typer.Option(
        None, help="Write the checks as JUnit XML.", metavar="FILE", dir_okay=False
    ),
    report: Path | None = typer.Option(
        None, help="Write the checks as one HTML file.", metavar="FILE", dir_okay=False
    ),
    chaos: int | None = typer.Option(
        None,
        help="Inject faults into the KV transfers, drawn from this seed, and kill a rank.",
        metavar="SEED",
    ),
    *,
    flags: dict[str, object],
) -> None:
    """Start the deployment, compare its tokens with those of one engine alone, stop it.

    The exit code is 1 when a check failed.
    """
    refuse_address(flags)
    with ending_at_errors():
        loaded = load_config(config, os.environ, flags)
        connector = loaded.config.kv_transfer.connector
        if chaos is not None:
            faults = faulty_settings(chaos, connector)
            # Load again with the faulty connector around the configured one.
            loaded = load_config(config, os.environ, flags | faults)
    checks: list[Check] = []
    facts: dict[str, object] = {
        "Model": loaded.config.model,
        "Connector": connector,
        "Faults": "none" if chaos is None else f"drawn from seed {chaos}",
    }
    try:
        _run(loaded, chaos, checks, facts)
    except PdlaunchError as error:
        done = "can be checked" if checks else "gets ready"
        checks.append(Check(f"the deployment {done}", 0.0, str(error)))
    except KeyboardInterrupt:
        print_errors(["interrupted"])
        raise typer.Exit(EXIT_INTERRUPTED) from None
    failed = [check for check in checks if check.failure is not None]
    _print_checks(checks)
    code = int(bool(failed))
    if junit is not None:
        code = max(code, _write_junit(checks, junit))
    if report is not None:
        code = max(code, write_report(report, smoke_page(checks, facts)))
    verdict = f"{len(failed)} of {len(checks)} checks failed"
    Console().print(Text(f"smoke: {verdict if failed else f'{len(checks)} checks passed'}"))
    raise typer.Exit(code)


def _run(
    loaded: LoadedConfig, chaos: int | None, checks: list[Check], facts: dict[str, object]
) -> None:
    """Fill ``checks`` and ``facts``; both keep their entries if this raises PdlaunchError."""
    key = loaded.config.api_key
    api_key = None if key is None else key.get_secret_value()
    with launched(loaded) as deployment:
        checks.append(Check("the deployment gets ready", round(deployment.start_s, 3)))
        # Known before the stop, to see afterwards whether one of them is left.
        children = psutil.Process(deployment.process.pid).children(recursive=True)
        # Only now: a model that had to be converted can be read.
        roles = resolve(loaded.config, {THIS_HOST: probe_machine()}, os.environ).roles.values()
        exact = {engines.dtype for engines in roles} == {"float32"}
        facts["Engines"] = ", ".join(
            f"{each.replicas} {each.role} ({each.dtype}, {each.device}, TP {each.tp_size})"
            for each in roles
        )
        if chaos is None:
            checks += smoke(deployment.url, api_key=api_key, exact=exact)
        else:
            checks += smoke_under_chaos(deployment, chaos, api_key=api_key, exact=exact)
        checks.append(_stop(deployment, children))


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


def _print_checks(checks: list[Check]) -> None:
    """Print a line for each check, and why it failed."""
    console = Console(soft_wrap=True)
    for check in checks:
        mark, style = ("ok", "green") if check.failure is None else ("FAILED", "bold red")
        console.print(
            Text.assemble((f"{mark:>6}", style), f"  {check.name} ({check.seconds:.1f} s)")
        )
        if check.failure is not None:
            console.print(Text(safe(f"        {check.failure}")))


def _write_junit(checks: list[Check], path: Path) -> int:
    """Write JUnit XML, one test case for each check; return the exit code, 1 when that failed."""
    cases = [junit_case("pdlaunch.smoke", check.name, check.seconds) for check in checks]
    for case, check in zip(cases, checks, strict=True):
        if check.failure is not None:
            ElementTree.SubElement(case, "failure", message=safe(check.failure))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        suite = ElementTree.ElementTree(junit_suite("pdlaunch smoke", cases))
        suite.write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        print_errors([f"--junit {path} cannot be written: {error.strerror or error}"])
        return 1
    return 0
