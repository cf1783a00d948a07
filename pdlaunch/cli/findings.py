"""Shows the report of a check: a table for people, JSON for programs, annotations for GitHub."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.text import Text

from pdlaunch.checks.rule import Finding
from pdlaunch.checks.run import SEVERITIES, NotChecked, Report
from pdlaunch.config.problems import Problem

STYLES = {"error": "red", "warning": "yellow", "info": "cyan"}
_GITHUB_LEVELS = {"error": "error", "warning": "warning", "info": "notice"}
_GAP = "  "


def safe(text: str) -> str:
    """Escape lone surrogates and control characters, which not every terminal or pipe takes."""
    shown = (char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
    return "".join(shown)


def place(finding: Finding) -> str:
    """Return ``block_size (deploy.yaml:3:13)``."""
    return f"{finding.where} ({finding.origin})" if finding.origin else finding.where


def print_table(console: Console, report: Report, *, ok: bool) -> None:
    """Print the findings by severity, the rules that were not checked, and a verdict."""
    for severity in SEVERITIES:
        found = [finding for finding in report.findings if finding.severity == severity]
        if found:
            console.print(
                Text(
                    f"{severity}s" if len(found) > 1 else severity,
                    style=f"bold {STYLES[severity]}",
                )
            )
            console.print(Group(*(_FindingView(finding) for finding in found)))
    if report.not_checked:
        console.print(Text("not checked", style="bold"))
        console.print(
            Padding(Group(*_not_checked_lines(report.not_checked)), (0, 0, 0, 2), expand=False)
        )
    counts = ", ".join(_count(report, severity) for severity in SEVERITIES)
    verdict = "ok" if ok else "not ok"
    console.print(Text(f"{verdict}: {counts}", style="bold green" if ok else "bold red"))
    if report.findings:
        console.print(Text(f"pdlaunch explain {report.findings[0].rule} says why", style="dim"))


class _FindingView:
    """Shows one finding: place and message in one line where they fit, else below each other."""

    def __init__(self, finding: Finding) -> None:
        self._finding = finding

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        finding, style = self._finding, STYLES[self._finding.severity]
        head = Text(f"  {finding.rule} ", style=f"bold {style}") + Text(
            safe(place(finding)), style="bold"
        )
        message = Text(safe(finding.message), style="default")
        rest: list[RenderableType] = []
        # Cells, not characters: wide ones take two columns.
        if head.cell_len + len(_GAP) + message.cell_len <= options.max_width:
            yield head + Text(_GAP) + message
        else:
            yield head
            rest.append(message)
        rest.append(Text(f"fix: {safe(finding.fix)}", style="dim"))
        yield Padding(Group(*rest), (0, 0, 0, 8), expand=False)


def _not_checked_lines(not_checked: Sequence[NotChecked]) -> Iterator[Text]:
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for item in not_checked:
        by_reason[item.reason].append(item.rule)
    for reason, codes in by_reason.items():
        yield Text(f"{', '.join(codes)}: {safe(reason)}", style="dim")


def _count(report: Report, severity: str) -> str:
    number = sum(finding.severity == severity for finding in report.findings)
    return f"{number} {severity}{'' if number == 1 else 's'}"


def report_json(report: Report, *, ok: bool) -> str:
    """Return ``{"ok", "findings", "resolved"}``; ``resolved`` names the rules not checked too."""
    not_checked = [{"rule": item.rule, "reason": item.reason} for item in report.not_checked]
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
            "resolved": {**report.resolved, "not_checked": not_checked},
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


def github_line(finding: Finding) -> str:
    """Return a workflow command, which shows a finding at its line of the file where it has one."""
    file, line, column = _split_origin(finding.origin)
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


def _split_origin(origin: str) -> tuple[str | None, str | None, str | None]:
    file, _, position = origin.rpartition(":")
    file, _, line = file.rpartition(":")
    return (
        (file, line, position)
        if file and line.isdigit() and position.isdigit()
        else (None, None, None)
    )
