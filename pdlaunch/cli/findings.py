"""Shows the report of a check: a table for people; for programs JSON and SARIF."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import quote

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from pdlaunch import __version__
from pdlaunch.checks.rule import SEVERITIES, Finding
from pdlaunch.checks.run import Report
from pdlaunch.cli import EXIT_FAILED, EXIT_UNUSABLE
from pdlaunch.cli.output import safe, say
from pdlaunch.config.problems import InvalidConfigError, Problem
from pdlaunch.errors import ConfigError
from pdlaunch.machine.profiles import AssumedMachine

CheckFormat = Literal["table", "json", "sarif"]
OutputOption = Annotated[CheckFormat, typer.Option("--format", help="How findings are printed.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")]
STYLES = {"error": "red", "warning": "yellow", "info": "cyan"}
UNUSABLE = "input"  # stands for a rule in what is reported of a configuration that cannot be used
_SARIF_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_WIDTH_OF_A_PIPE = 100_000


def print_report(
    report: Report,
    output: CheckFormat,
    *,
    strict: bool,
    assumed: AssumedMachine | None = None,
    path: Path | None = None,
) -> NoReturn:
    """Print a report in the form of ``output``, and exit with 0, or 1 with what fails the check.

    ``path``: of the configuration.
    """
    code = 0 if report.is_ok(strict=strict) else EXIT_FAILED
    if output == "table":
        _print_findings(report, ok=code == 0, assumed=assumed)
    else:
        about = assumed and {"name": assumed.name, "about": assumed.about}
        report = replace(report, resolved={**report.resolved, "assumed": about})
        typer.echo(_written(report, output, code, path))
    raise typer.Exit(code)


def refuse_input(error: ConfigError, output: CheckFormat, path: Path | None) -> NoReturn:
    """Print why the input is unusable: on stderr, and on stdout in the form of ``output``."""
    found: Sequence[Problem] = (Problem(str(error), error.field, fix=error.fix),)
    if isinstance(error, InvalidConfigError):
        found = error.problems
    if output != "table":
        findings = tuple(map(_finding_of, found))
        typer.echo(_written(Report(findings, (), (), {}), output, EXIT_UNUSABLE, path))
    for problem in found:
        say(f"error: {problem}", "red")
    raise typer.Exit(EXIT_UNUSABLE)


def _finding_of(problem: Problem) -> Finding:
    message = f"{problem.field}: {problem.message}" if problem.field else problem.message
    where = problem.where or problem.field or ""
    return Finding(UNUSABLE, "error", where, message, problem.fix or "", problem.where or "")


def _written(report: Report, output: CheckFormat, exit_code: int, path: Path | None) -> str:
    document = (
        _json(report, ok=exit_code == 0) if output == "json" else _sarif(report, exit_code, path)
    )
    return json.dumps(document, indent=2)


def _place(finding: Finding) -> str:
    """Return ``block_size (deploy.yaml:3:13)``."""
    is_told = not finding.origin or finding.origin == finding.where
    return finding.where if is_told else f"{finding.where} ({finding.origin})"


def say_finding(finding: Finding) -> None:
    """Print two lines to stderr: what is wrong and where, and how to fix it."""
    text = f"{finding.severity} {finding.rule} {_place(finding)}: {finding.message}"
    say(text, STYLES[finding.severity])
    say(f"  fix: {finding.fix}")


def _print_findings(report: Report, *, ok: bool, assumed: AssumedMachine | None) -> None:
    """Print the findings by severity, the rules that were not checked, and a verdict."""
    console = Console()
    # A pipe gets its lines whole; terminals and COLUMNS have their width.
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_A_PIPE

    def say(text: Text, indent: int = 0) -> None:
        console.print(Padding(text, (0, 0, 0, indent), expand=False))

    counts = []
    for severity in SEVERITIES:
        found = [finding for finding in report.findings if finding.severity == severity]
        counts.append(f"{len(found)} {severity}{'' if len(found) == 1 else 's'}")
        if found:
            heading = f"{severity}s" if len(found) > 1 else severity
            say(Text(heading, style=f"bold {STYLES[severity]}"))
        for finding in found:
            head = Text(f"{finding.rule} ", style=f"bold {STYLES[severity]}")
            place = Text(safe(_place(finding)), style="bold")
            say(head + place + Text(f"  {safe(finding.message)}", style="not bold default"), 2)
            say(Text(f"fix: {safe(finding.fix)}", style="dim"), 8)
    if gaps := _gaps(report):
        say(Text("not checked", style="bold"))
        for gap in gaps:
            say(Text(gap, style="dim"), 2)
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
        # What ``serve`` measures of pairs is missing in every check.
        if item.needs != ("transport",):
            by_facts[item.needs, item.reason].append(item.rule)
    return [
        f"{', '.join(rules)} {'needs' if len(rules) == 1 else 'need'} {' and '.join(needs)}: "
        f"{safe(reason)}"
        for (needs, reason), rules in by_facts.items()
    ]


def _json(report: Report, *, ok: bool) -> dict[str, Any]:
    findings = [
        {
            "rule": finding.rule,
            "severity": finding.severity,
            "where": _place(finding),
            "message": finding.message,
            "fix": finding.fix,
        }
        for finding in report.findings
    ]
    not_checked = [
        {"rule": item.rule, "needs": list(item.needs), "reason": item.reason}
        for item in report.not_checked
    ]
    resolved = {**report.resolved, "not_checked": not_checked} if report.resolved else {}
    return {"ok": ok, "findings": findings, "resolved": resolved}


def _sarif(report: Report, exit_code: int, file: Path | None) -> dict[str, Any]:
    """Return the log of one run: rules and findings.

    A finding whose setting stands in no file is put at ``file``. Source: OASIS Standard "Static
    Analysis Results Interchange Format (SARIF) Version 2.1.0".
    """
    levels = {"error": "error", "warning": "warning", "info": "note"}
    rules: list[dict[str, Any]] = [
        {
            "id": rule.code,
            "shortDescription": {"text": rule.title},
            "fullDescription": {"text": rule.why or rule.title},
            "help": {"text": f"Fix: {rule.fix}\nSource: {rule.source}"},
            "defaultConfiguration": {"level": levels[rule.severity]},
        }
        for rule in report.rules
    ]
    is_usable = exit_code != EXIT_UNUSABLE
    if not is_usable:
        rules = [{"id": UNUSABLE, "shortDescription": {"text": "The input cannot be used."}}]
    indices = {rule["id"]: index for index, rule in enumerate(rules)}
    results = [
        {
            "ruleId": finding.rule,
            "ruleIndex": indices[finding.rule],
            "level": levels[finding.severity],
            "message": {"text": safe(f"{finding.message}. Fix: {finding.fix}")},
            "locations": [_location(finding, file)],
        }
        for finding in report.findings
    ]
    driver = {"name": "pdlaunch check-config", "version": __version__, "rules": rules}
    invocation = {"executionSuccessful": is_usable, "exitCode": exit_code}
    run = {"tool": {"driver": driver}, "invocations": [invocation], "results": results}
    return {"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}


def _location(finding: Finding, file: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": safe(finding.where)}]}
    # ``deploy.yaml:3:5``, or a flag such as ``--port``.
    name, *place = finding.origin.rsplit(":", 2)
    has_place = bool(name) and len(place) == 2 and all(part.isdigit() for part in place)
    path: PurePath | None = PurePath(name) if has_place else file
    if path is None:
        return found
    # An absolute file's URI, or a relative reference: from the root of the sources.
    uri = path.as_uri() if path.is_absolute() else quote(str(path), errors="backslashreplace")
    physical: dict[str, Any] = {"artifactLocation": {"uri": uri}}
    if has_place:
        physical["region"] = {"startLine": int(place[0]), "startColumn": int(place[1])}
    return found | {"physicalLocation": physical}
