"""Shows the report of a check: a table for people, JSON for programs."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from pdlaunch.checks.rule import SEVERITIES, Finding
from pdlaunch.checks.run import Report
from pdlaunch.cli import EXIT_FAILED, EXIT_UNUSABLE
from pdlaunch.cli.output import Format, counted, print_json, safe, say
from pdlaunch.config.problems import InvalidConfigError, Problem
from pdlaunch.errors import ConfigError
from pdlaunch.machine.profiles import AssumedMachine

StrictOption = Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")]
STYLES = {"error": "red", "warning": "yellow", "info": "cyan"}
UNUSABLE = "input"  # stands for the rule in the report on an unusable configuration
_WIDTH_OF_A_PIPE = 100_000


def print_report(
    report: Report, output: Format, *, strict: bool, assumed: AssumedMachine | None = None
) -> NoReturn:
    """Print a report in the form of ``output``, and exit with 0, or with 1 if the check fails."""
    is_ok = report.is_ok(strict=strict)
    if output == "table":
        _print_findings(report, ok=is_ok, assumed=assumed)
    else:
        _print_json(report, ok=is_ok, assumed=assumed)
    raise typer.Exit(0 if is_ok else EXIT_FAILED)


def refuse_input(error: ConfigError, output: Format) -> NoReturn:
    """Print why the input is unusable: on stderr, and on stdout in the form of ``output``."""
    found: Sequence[Problem] = (Problem(str(error), error.field, fix=error.fix),)
    if isinstance(error, InvalidConfigError):
        found = error.problems
    if output != "table":
        _print_json(Report(tuple(map(_finding_of, found)), (), {}), ok=False)
    for problem in found:
        say(f"error: {problem}", "red")
    raise typer.Exit(EXIT_UNUSABLE)


def _finding_of(problem: Problem) -> Finding:
    message = f"{problem.field}: {problem.message}" if problem.field else problem.message
    where = problem.where or problem.field or ""
    return Finding(UNUSABLE, "error", where, message, problem.fix or "", problem.where or "")


def _place(finding: Finding) -> str:
    is_reported = not finding.origin or finding.origin == finding.where
    return finding.where if is_reported else f"{finding.where} ({finding.origin})"


def say_finding(finding: Finding) -> None:
    """Print two lines to stderr: what is wrong and where, and how to fix it."""
    text = f"{finding.severity} {finding.rule} {_place(finding)}: {finding.message}"
    say(text, STYLES[finding.severity])
    say(f"  fix: {finding.fix}")


def _print_findings(report: Report, *, ok: bool, assumed: AssumedMachine | None) -> None:
    """Print the findings by severity, the rules that were not checked, and a verdict."""
    console = Console()
    # Lines to a pipe are not wrapped; a terminal or COLUMNS sets the width.
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_A_PIPE

    def say(text: Text, indent: int = 0) -> None:
        console.print(Padding(text, (0, 0, 0, indent), expand=False))

    counts = []
    for severity in SEVERITIES:
        found = [finding for finding in report.findings if finding.severity == severity]
        counts.append(counted(len(found), severity))
        if found:
            heading = f"{severity}s" if len(found) > 1 else severity
            say(Text(heading, style=f"bold {STYLES[severity]}"))
        for finding in found:
            head = Text(f"{finding.rule} ", style=f"bold {STYLES[severity]}")
            place = Text(safe(_place(finding)), style="bold")
            say(head + place + Text(f"  {safe(finding.message)}", style="not bold default"), 2)
            if finding.fix:
                say(Text(f"fix: {safe(finding.fix)}", style="dim"), 8)
    if gaps := _gaps(report):
        say(Text("not checked", style="bold"))
        for gap in gaps:
            say(Text(gap, style="dim"), 2)
    if report.measured:
        say(Text(safe(report.measured)))
    if assumed is not None:
        about = f": {safe(assumed.about)}" if assumed.about else ""
        say(Text(f"for {safe(assumed.name)}{about}", style="dim"))
    said = f"{'ok' if ok else 'not ok'}: {', '.join(counts) if report.findings else 'no findings'}"
    say(Text(said, style="bold green" if ok else "bold red"))
    if report.findings:
        say(Text(f"pdlaunch explain {report.findings[0].rule} says why", style="dim"))


def _gaps(report: Report) -> list[str]:
    """Return a line for each group of unchecked rules that lack the same facts."""
    by_facts: defaultdict[tuple[tuple[str, ...], str], list[str]] = defaultdict(list)
    for item in report.not_checked:
        # The transport of pairs is missing in every check: ``serve`` measures it.
        if item.needs != ("transport",):
            by_facts[item.needs, item.reason].append(item.rule)
    lines = []
    for (needs, reason), rules in by_facts.items():
        verb = "needs" if len(rules) == 1 else "need"
        lines.append(f"{', '.join(rules)} {verb} {' and '.join(needs)}: {safe(reason)}")
    return lines


def _print_json(report: Report, *, ok: bool, assumed: AssumedMachine | None = None) -> None:
    findings = []
    for each in report.findings:
        fields = asdict(replace(each, where=_place(each)))
        findings.append({name: fields[name] for name in fields if name != "origin"})
    about = assumed and {"name": assumed.name, "about": assumed.about}
    more = {"not_checked": report.not_checked, "assumed": about}
    resolved = report.resolved and {**report.resolved, **more}
    if report.measured:
        resolved = {**resolved, "measured": report.measured}
    print_json({"ok": ok, "findings": findings, "resolved": resolved})
