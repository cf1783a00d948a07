"""The rules of ``check-config`` inside ``serve``: before anything starts, and on the measured pairs
once all is ready.
"""

from __future__ import annotations

from collections.abc import Mapping

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.checks.models import read_weight_errors
from pdlaunch.checks.rule import Finding
from pdlaunch.checks.run import run_checks
from pdlaunch.cli.findings import place, safe
from pdlaunch.cli.transport import transport_report
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.sources import LoadedConfig
from pdlaunch.platform.facts import Machine
from pdlaunch.platform.folders import why_not_writable
from pdlaunch.platform.gpu_links import read_gpu_links
from pdlaunch.supervisor.pair_links import ReadLinks
from pdlaunch.supervisor.status import LaunchStatus

EXIT_FINDINGS = 1
_STYLES = {"error": "red", "warning": "yellow", "info": "dim"}


def probe_folders(config: LaunchConfig) -> dict[str, str]:
    """By setting, why the folder that it names cannot be written to."""
    problems = {
        name: why_not_writable(folder) for name, folder in config.kv_transfer.folders.items()
    }
    return {name: problem for name, problem in problems.items() if problem is not None}


def refuse_errors(
    loaded: LoadedConfig, machine: Machine, environ: Mapping[str, str], console: Console
) -> None:
    """Print warnings and errors of all rules; raises ``typer.Exit`` when there are errors."""
    report = run_checks(
        loaded,
        machine,
        environ,
        folder_problems=probe_folders(loaded.config),
        weight_errors=read_weight_errors(loaded.config),
    )
    for finding in report.findings:
        if finding.severity != "info":
            print_finding(console, finding)
    if not report.is_ok():
        console.print(
            Text(
                f"not started: {len(report.errors)} error(s); `pdlaunch explain CODE` says why",
                style="red",
            )
        )
        raise typer.Exit(EXIT_FINDINGS)


def print_finding(console: Console, finding: Finding) -> None:
    """Two lines: what and where, and what to do."""
    text = f"{finding.severity} {finding.rule} {place(finding)}: {finding.message}"
    console.print(Text(safe(text), style=_STYLES[finding.severity]))
    console.print(Text(f"  fix: {safe(finding.fix)}"))


def judge_pairs(
    loaded: LoadedConfig,
    machine: Machine,
    environ: Mapping[str, str],
    status: LaunchStatus,
    read_links: ReadLinks = read_gpu_links,
) -> tuple[Finding, ...]:
    """What the transport rules say against the pairs that the handshakes have measured."""
    report = transport_report(loaded.config, machine, environ, status, read_links)
    findings = run_checks(loaded, machine, environ, transport=report, family="PD5").findings
    # The speeds themselves (infos) stand in the panel already.
    return tuple(finding for finding in findings if finding.severity != "info")
