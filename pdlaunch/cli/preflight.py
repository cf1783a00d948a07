"""The rules of ``check-config`` inside ``serve``: before anything starts, and on the measured pairs
once all is ready.
"""

from __future__ import annotations

from collections.abc import Mapping

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.checks.context import Probes
from pdlaunch.checks.rule import Finding
from pdlaunch.checks.run import run_checks
from pdlaunch.cli.findings import place, safe
from pdlaunch.cli.transport import measured_pairs
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.sources import Origin
from pdlaunch.engines.plan import kind_of
from pdlaunch.platform.folders import why_not_writable
from pdlaunch.platform.gpu_links import read_gpu_links
from pdlaunch.resolve.models import weight_error
from pdlaunch.resolve.resolve import ResolvedLaunch
from pdlaunch.supervisor.pair_links import ReadLinks
from pdlaunch.supervisor.status import LaunchStatus

EXIT_FINDINGS = 1
_STYLES = {"error": "red", "warning": "yellow", "info": "dim"}


def probe_files(resolved: ResolvedLaunch) -> Probes:
    """Look at the files of weights, and at the folders that must be writable."""
    weight_errors = {
        role: error
        for role, engines in resolved.roles.items()
        if engines.settings.load_format != "dummy"
        and (error := weight_error(engines.model)) is not None
    }
    return Probes(folder_problems=_probe_folders(resolved.config), weight_errors=weight_errors)


def _probe_folders(config: LaunchConfig) -> dict[str, str]:
    """Return by setting why the folder that it names cannot be written to."""
    problems = {
        name: why_not_writable(folder) for name, folder in config.kv_transfer.folders.items()
    }
    return {name: problem for name, problem in problems.items() if problem is not None}


def refuse_errors(
    resolved: ResolvedLaunch, origins: Mapping[str, Origin], console: Console
) -> None:
    """Print warnings and errors of all rules; raise ``typer.Exit`` when there are errors."""
    report = run_checks(resolved, origins, probe_files(resolved), rules=kind_of(resolved).rules())
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
    resolved: ResolvedLaunch,
    origins: Mapping[str, Origin],
    status: LaunchStatus,
    read_links: ReadLinks = read_gpu_links,
) -> tuple[Finding, ...]:
    """Return what the transport rules find in the pairs that the handshakes have measured."""
    probes = Probes(transport=measured_pairs(resolved, status, read_links))
    findings = run_checks(
        resolved, origins, probes, family="PD5", rules=kind_of(resolved).rules()
    ).findings
    # The speeds themselves (infos) stand in the panel already.
    return tuple(finding for finding in findings if finding.severity != "info")
