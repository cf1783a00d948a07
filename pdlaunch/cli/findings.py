"""Shows the report of a check: a table for people, JSON for programs, annotations for GitHub."""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from pdlaunch.checks.context import WITHOUT_PROBE
from pdlaunch.checks.rule import SEVERITIES, Finding
from pdlaunch.checks.run import Report
from pdlaunch.cli.output import safe
from pdlaunch.config.problems import Problem
from pdlaunch.machine.machine_file import AssumedMachine

STYLES = {"error": "red", "warning": "yellow", "info": "cyan"}
_GITHUB_LEVELS = {"error": "error", "warning": "warning", "info": "notice"}
_GAP = "  "
_INDENT = 8
_WIDTH_OF_A_PIPE = 100_000


def place(finding: Finding) -> str:
    """Return ``block_size (deploy.yaml:3:13)``."""
    return f"{finding.where} ({finding.origin})" if finding.origin else finding.where


@dataclass(frozen=True, slots=True)
class Gap:
    """Names rules that were not checked for want of the same facts."""

    rules: tuple[str, ...]
    needs: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        verb = "needs" if len(self.rules) == 1 else "need"
        facts = " and ".join(self.needs)
        return f"{', '.join(self.rules)} {verb} {facts}: {safe(self.reason)}"


def gaps(report: Report) -> list[Gap]:
    """Return what was not checked, in the order of the rules."""
    by_facts: defaultdict[tuple[tuple[str, ...], str], list[str]] = defaultdict(list)
    for item in report.not_checked:
        by_facts[item.needs, item.reason].append(item.rule)
    return [Gap(tuple(rules), needs, reason) for (needs, reason), rules in by_facts.items()]


def without_probe(report: Report) -> list[str]:
    """Return the rules that were not checked when all that is missing is what ``--probe`` finds
    out; empty when more or less is.
    """
    missing = {need for item in report.not_checked for need in item.needs}
    is_all = len(missing) > 1 and missing <= WITHOUT_PROBE
    return [item.rule for item in report.not_checked] if is_all else []


def span(codes: Sequence[str]) -> str:
    """Return codes with three or more neighbours as a range: ``PD404, PD501 to PD505``."""
    # Neighbours keep the same distance from their place in the list.
    runs = itertools.groupby(enumerate(codes), key=lambda item: int(item[1][2:]) - item[0])
    parts = [[code for _, code in run] for _, run in runs]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in parts)


def report_console() -> Console:
    """Return a console whose lines a pipe gets whole; terminals and COLUMNS have their width."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_A_PIPE
    return console


def print_findings(
    console: Console, report: Report, *, ok: bool, assumed: AssumedMachine | None = None
) -> None:
    """Print the findings by severity, the rules that were not checked, and a verdict; one line
    where nothing is found and nothing but ``--probe`` would find more.
    """
    for severity in SEVERITIES:
        found = [finding for finding in report.findings if finding.severity == severity]
        if found:
            heading = f"{severity}s" if len(found) > 1 else severity
            console.print(Text(heading, style=f"bold {STYLES[severity]}"))
        for finding in found:
            _print_finding(console, finding)
    quiet = without_probe(report)
    if report.not_checked and not quiet:
        console.print(Text("not checked", style="bold"))
        for gap in gaps(report):
            _print_indented(console, Text(str(gap), style="dim"), 2)
    if assumed is not None:
        text = f"for {safe(assumed.name)}: {safe(assumed.about)}" if assumed.about else ""
        _print_indented(console, Text(text or f"for {safe(assumed.name)}", style="dim"), 0)
    counts = ", ".join(_count(report, severity) for severity in SEVERITIES)
    verdict = Text(
        f"{'ok' if ok else 'not ok'}: {counts if report.findings else 'no findings'}",
        style="bold green" if ok else "bold red",
    )
    if quiet:
        rules = f"{quiet[0]} and {len(quiet) - 1} more"
        verdict += Text(f"; not checked without --probe: {rules}", style="not bold dim default")
    _print_indented(console, verdict, 0)
    if report.findings:
        console.print(Text(f"pdlaunch explain {report.findings[0].rule} says why", style="dim"))


def _print_finding(console: Console, finding: Finding) -> None:
    """Print place and message in one line where they fit, else below each other; then the fix."""
    head = Text(f"  {finding.rule} ", style=f"bold {STYLES[finding.severity]}") + Text(
        safe(place(finding)), style="bold"
    )
    message = Text(safe(finding.message), style="default")
    # Cells, not characters: wide ones take two columns.
    if head.cell_len + len(_GAP) + message.cell_len <= console.width:
        console.print(head + Text(_GAP) + message, soft_wrap=True)
    else:
        _print_indented(console, head, 0)
        _print_indented(console, message, _INDENT)
    _print_indented(console, Text(f"fix: {safe(finding.fix)}", style="dim"), _INDENT)


def _print_indented(console: Console, text: Text, indent: int) -> None:
    """Print a text in lines that fit, without blanks at their ends."""
    for line in text.wrap(console, max(console.width - indent, 1)):
        line.rstrip()
        console.print(Text(" " * indent) + line, soft_wrap=True)


def _count(report: Report, severity: str) -> str:
    number = sum(finding.severity == severity for finding in report.findings)
    return f"{number} {severity}{'' if number == 1 else 's'}"


def report_json(report: Report, *, ok: bool, assumed: AssumedMachine | None = None) -> str:
    """Return ``{"ok", "findings", "resolved"}``; ``resolved`` names the rules not checked too, and
    the machine that was assumed.
    """
    not_checked = [
        {"rule": item.rule, "needs": list(item.needs), "reason": item.reason}
        for item in report.not_checked
    ]
    findings = [
        {
            "rule": finding.rule,
            "severity": finding.severity,
            "where": place(finding),
            "message": finding.message,
            "fix": finding.fix,
        }
        for finding in report.findings
    ]
    return json.dumps(
        {
            "ok": ok,
            "findings": findings,
            "resolved": {
                **report.resolved,
                "assumed": assumed and {"name": assumed.name, "about": assumed.about},
                "not_checked": not_checked,
            },
        },
        indent=2,
    )


def problems_json(problems: Iterable[Problem]) -> str:
    """Return the same form for a configuration that cannot be used."""
    findings = [
        {
            "rule": "input",
            "severity": "error",
            "where": problem.where or problem.field or "",
            "message": f"{problem.field}: {problem.message}" if problem.field else problem.message,
            "fix": problem.fix or "",
        }
        for problem in problems
    ]
    return json.dumps({"ok": False, "findings": findings, "resolved": {}}, indent=2)


def github_report(report: Report) -> Iterator[str]:
    """Return a workflow command for each finding, and for what was not checked."""
    yield from map(github_line, report.findings)
    quiet = without_probe(report)
    lines = [f"{span(quiet)}: only with --probe"] if quiet else map(str, gaps(report))
    for line in lines:
        yield _command("notice", {"title": "not checked"}, line)


def github_line(finding: Finding) -> str:
    """Return a workflow command, which shows a finding at its line of the file where it has one."""
    file, line, column = split_origin(finding.origin)
    properties = {"file": file, "line": line, "col": column, "title": finding.rule}
    return _command(
        _GITHUB_LEVELS[finding.severity],
        properties,
        f"{finding.where}: {finding.message}. Fix: {finding.fix}",
    )


def github_problem(problem: Problem, file: str | None) -> str:
    """Return the workflow command for a configuration that cannot be used."""
    at_line = problem.line is not None
    properties = {
        "file": file if at_line else None,
        "line": str(problem.line) if at_line else None,
        "col": str(problem.column) if at_line else None,
        "title": "configuration",
    }
    return _command("error", properties, str(problem))


def _command(level: str, properties: dict[str, str | None], message: str) -> str:
    given = ",".join(
        f"{name}={_escape(value, ':,')}" for name, value in properties.items() if value
    )
    return f"::{level} {given}::{_escape(message)}"


def _escape(text: str, more: str = "") -> str:
    """Escape a text the way that the runner decodes it."""
    escaped = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    for char in more:
        escaped = escaped.replace(char, f"%{ord(char):02X}")
    return safe(escaped)


def split_origin(origin: str) -> tuple[str | None, str | None, str | None]:
    """Return file, line and column of ``deploy.yaml:3:5``; None for what is no place in a file."""
    file, _, position = origin.rpartition(":")
    file, _, line = file.rpartition(":")
    return (
        (file, line, position)
        if file and line.isdigit() and position.isdigit()
        else (None, None, None)
    )
