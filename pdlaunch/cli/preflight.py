"""The rules of ``check-config`` inside ``serve``: before anything starts, and on the measured pairs once all is ready."""

from __future__ import annotations

from collections.abc import Mapping

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch.checks.rule import Finding
from pdlaunch.checks.run import run_checks
from pdlaunch.checks.transport_report import Allocator, PairTransport, TransportReport
from pdlaunch.cli.findings import place, safe
from pdlaunch.config.memory_options import memory_options
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.sources import LoadedConfig
from pdlaunch.platform.allocator_conf import read_expandable_segments
from pdlaunch.platform.facts import Machine
from pdlaunch.supervisor.status import LaunchStatus

EXIT_FINDINGS = 1
_STYLES = {"error": "red", "warning": "yellow", "info": "dim"}


def refuse_errors(loaded: LoadedConfig, machine: Machine, environ: Mapping[str, str], console: Console) -> None:
    """Print warnings and errors of all rules; raises ``typer.Exit`` when there are errors."""
    report = run_checks(loaded, machine, environ)
    for finding in report.findings:
        if finding.severity != "info":
            print_finding(console, finding)
    if not report.is_ok():
        console.print(Text(f"not started: {len(report.errors)} error(s); `pdlaunch explain CODE` says why", style="red"))
        raise typer.Exit(EXIT_FINDINGS)


def print_finding(console: Console, finding: Finding) -> None:
    """Two lines: what and where, and what to do."""
    text = f"{finding.severity} {finding.rule} {place(finding)}: {finding.message}"
    console.print(Text(safe(text), style=_STYLES[finding.severity]))
    console.print(Text(f"  fix: {safe(finding.fix)}"))


def judge_pairs(loaded: LoadedConfig, machine: Machine, environ: Mapping[str, str], status: LaunchStatus) -> tuple[Finding, ...]:
    """What the transport rules say of the pairs that the handshakes have measured."""
    allocator = _allocator(loaded.config, machine, environ)
    measured = [
        PairTransport(
            puller=pair.local, holder=pair.peer, path=pair.path, allocator=allocator, gigabytes_per_s=pair.gigabytes_per_s
        )
        for pair in status.pairs
    ]
    return run_checks(loaded, machine, environ, transport=TransportReport(tuple(measured)), family="PD5").findings


def _allocator(config: LaunchConfig, machine: Machine, environ: Mapping[str, str]) -> Allocator:
    """Of the prefill engines' KV caches, which decode reads."""
    settings = config.engine_settings("prefill")
    if settings.device == "cpu" or not machine.gpus:
        return "host"
    if memory_options(settings).cumem_allocator:
        return "cumem"
    return "expandable_segments" if read_expandable_segments({**environ, **settings.env}).enabled else "cuda"
