"""Shows the report of a check: a table for people; for programs JSON, GitHub's workflow commands,
SARIF and JUnit.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import quote
from xml.etree import ElementTree

import typer
from rich.console import Console
from rich.text import Text

from pdlaunch import __version__
from pdlaunch.checks.context import WITHOUT_PROBE
from pdlaunch.checks.rule import SEVERITIES, Finding
from pdlaunch.checks.run import Report, family
from pdlaunch.cli import EXIT_FAILED, EXIT_UNUSABLE
from pdlaunch.cli.output import safe
from pdlaunch.config.problems import InvalidConfigError, Problem
from pdlaunch.errors import ConfigError
from pdlaunch.machine.machine_file import AssumedMachine

CheckFormat = Literal["table", "json", "github", "sarif", "junit"]
OutputOption = Annotated[CheckFormat, typer.Option("--format", help="How findings are printed.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")]
STYLES = {"error": "red", "warning": "yellow", "info": "cyan"}
UNUSABLE = "input"  # stands for a rule in what is reported of a configuration that cannot be used
_SARIF_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_INDENT = 8
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
    ok = report.is_ok(strict=strict)
    if output == "table":
        print_findings(report_console(), report, ok=ok, assumed=assumed)
    else:
        about = assumed and {"name": assumed.name, "about": assumed.about}
        report = replace(report, resolved={**report.resolved, "assumed": about})
        typer.echo(_written(report, output, 0 if ok else EXIT_FAILED, strict, path))
    raise typer.Exit(0 if ok else EXIT_FAILED)


def refuse_input(error: ConfigError, output: CheckFormat, path: Path | None) -> NoReturn:
    """Print why the input is unusable: on stderr, and on stdout in the form of ``output``."""
    found: Sequence[Problem] = (Problem(str(error), error.field, fix=error.fix),)
    if isinstance(error, InvalidConfigError):
        found = error.problems
    if output != "table":
        findings = tuple(map(_finding_of, found))
        typer.echo(_written(Report(findings, (), (), {}), output, EXIT_UNUSABLE, False, path))
    errors = Console(file=sys.stderr, soft_wrap=True)
    for problem in found:
        errors.print(Text(f"error: {safe(str(problem))}", style="red"))
    raise typer.Exit(EXIT_UNUSABLE)


def _finding_of(problem: Problem) -> Finding:
    message = f"{problem.field}: {problem.message}" if problem.field else problem.message
    where = problem.where or problem.field or ""
    return Finding(UNUSABLE, "error", where, message, problem.fix or "", problem.where or "")


def _written(
    report: Report, output: CheckFormat, exit_code: int, strict: bool, path: Path | None
) -> str:
    match output:
        case "json":
            return json.dumps(_json(report, ok=exit_code == 0), indent=2)
        case "github":
            return "\n".join(_github(report))
        case "sarif":
            return json.dumps(_sarif(report, exit_code, path), indent=2)
        case _:
            return _junit(report, strict=strict)


def place(finding: Finding) -> str:
    """Return ``block_size (deploy.yaml:3:13)``."""
    is_told = not finding.origin or finding.origin == finding.where
    return finding.where if is_told else f"{finding.where} ({finding.origin})"


def _gaps(report: Report) -> list[str]:
    """Return what was not checked, in the order of the rules: those for want of the same facts
    together.
    """
    by_facts: defaultdict[tuple[tuple[str, ...], str], list[str]] = defaultdict(list)
    for item in report.not_checked:
        by_facts[item.needs, item.reason].append(item.rule)
    return [
        f"{', '.join(rules)} {'needs' if len(rules) == 1 else 'need'} {' and '.join(needs)}: "
        f"{safe(reason)}"
        for (needs, reason), rules in by_facts.items()
    ]


def _without_probe(report: Report) -> list[str]:
    """Return the rules that were not checked when all that is missing is what ``--probe`` finds
    out; empty when more or less is.
    """
    missing = {need for item in report.not_checked for need in item.needs}
    is_all = len(missing) > 1 and missing <= WITHOUT_PROBE
    return [item.rule for item in report.not_checked] if is_all else []


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
    counts = []
    for severity in SEVERITIES:
        found = [finding for finding in report.findings if finding.severity == severity]
        counts.append(f"{len(found)} {severity}{'' if len(found) == 1 else 's'}")
        if found:
            heading = f"{severity}s" if len(found) > 1 else severity
            console.print(Text(heading, style=f"bold {STYLES[severity]}"))
        for finding in found:
            _print_whole(console, finding)
    quiet = _without_probe(report)
    if report.not_checked and not quiet:
        console.print(Text("not checked", style="bold"))
        for gap in _gaps(report):
            _print_indented(console, Text(gap, style="dim"), 2)
    if assumed is not None:
        about = f": {safe(assumed.about)}" if assumed.about else ""
        _print_indented(console, Text(f"for {safe(assumed.name)}{about}", style="dim"), 0)
    said = f"{'ok' if ok else 'not ok'}: {', '.join(counts) if report.findings else 'no findings'}"
    verdict = Text(said, style="bold green" if ok else "bold red")
    if quiet:
        rules = f"{quiet[0]} and {len(quiet) - 1} more"
        verdict += Text(f"; not checked without --probe: {rules}", style="not bold dim default")
    _print_indented(console, verdict, 0)
    if report.findings:
        console.print(Text(f"pdlaunch explain {report.findings[0].rule} says why", style="dim"))


def _print_whole(console: Console, finding: Finding) -> None:
    """Print place and message in one line where they fit, else below each other; then the fix."""
    head = Text(f"  {finding.rule} ", style=f"bold {STYLES[finding.severity]}")
    head += Text(safe(place(finding)), style="bold")
    message = Text(safe(finding.message), style="default")
    # Cells, not characters: wide ones take two columns.
    if head.cell_len + 2 + message.cell_len <= console.width:
        console.print(head + Text("  ") + message, soft_wrap=True)
    else:
        _print_indented(console, head, 0)
        _print_indented(console, message, _INDENT)
    _print_indented(console, Text(f"fix: {safe(finding.fix)}", style="dim"), _INDENT)


def _print_indented(console: Console, text: Text, indent: int) -> None:
    """Print a text in lines that fit, without blanks at their ends."""
    for line in text.wrap(console, max(console.width - indent, 1)):
        line.rstrip()
        console.print(Text(" " * indent) + line, soft_wrap=True)


def print_finding(console: Console, finding: Finding) -> None:
    """Print two lines: what is wrong and where, and how to fix it."""
    text = f"{finding.severity} {finding.rule} {place(finding)}: {finding.message}"
    console.print(Text(safe(text), style=STYLES[finding.severity]))
    console.print(Text(f"  fix: {safe(finding.fix)}"))


def _json(report: Report, *, ok: bool) -> dict[str, Any]:
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
    not_checked = [
        {"rule": item.rule, "needs": list(item.needs), "reason": item.reason}
        for item in report.not_checked
    ]
    resolved = {**report.resolved, "not_checked": not_checked} if report.resolved else {}
    return {"ok": ok, "findings": findings, "resolved": resolved}


def _split_origin(origin: str) -> tuple[str, str, str] | None:
    """Return file, line and column of ``deploy.yaml:3:5``; None for what is no place in a file."""
    file, _, column = origin.rpartition(":")
    file, _, line = file.rpartition(":")
    return (file, line, column) if file and line.isdigit() and column.isdigit() else None


def _github(report: Report) -> Iterator[str]:
    """Yield a workflow command for each finding, shown at its line of the file where it has one,
    and for what was not checked.
    """
    for finding in report.findings:
        level = {"info": "notice"}.get(finding.severity, finding.severity)
        is_input = finding.rule == UNUSABLE
        properties = {"title": "configuration" if is_input else finding.rule}
        if split := _split_origin(finding.origin):
            properties = dict(zip(("file", "line", "col"), split, strict=True)) | properties
        message = finding.message if is_input else f"{finding.where}: {finding.message}"
        yield _command(level, properties, f"{message}. Fix: {finding.fix}".removesuffix(". Fix: "))
    quiet = _without_probe(report)
    for line in [f"{_span(quiet)}: only with --probe"] if quiet else _gaps(report):
        yield _command("notice", {"title": "not checked"}, line)


def _span(codes: Sequence[str]) -> str:
    """Return codes with three or more neighbours as a range: ``PD404, PD501 to PD505``."""
    # Neighbours keep the same distance from their place in the list.
    runs = itertools.groupby(enumerate(codes), key=lambda item: int(item[1][2:]) - item[0])
    parts = [[code for _, code in run] for _, run in runs]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in parts)


def _command(level: str, properties: dict[str, str], message: str) -> str:
    given = ",".join(f"{name}={_escape(value, ':,')}" for name, value in properties.items())
    return f"::{level} {given}::{_escape(message)}"


def _escape(text: str, more: str = "") -> str:
    """Escape a text the way that GitHub's runner decodes it."""
    for char in ("%", "\r", "\n", *more):
        text = text.replace(char, f"%{ord(char):02X}")
    return safe(text)


def _sarif(report: Report, exit_code: int, file: Path | None) -> dict[str, Any]:
    """Return the log of one run: rules, findings, and a note for each rule that was not checked.

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
    notes = [
        {
            "level": "note",
            "message": {"text": f"not checked: needs {', '.join(item.needs)}: {safe(item.reason)}"},
            "associatedRule": {"id": item.rule, "index": indices[item.rule]},
        }
        for item in report.not_checked
    ]
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
    invocation = {
        "executionSuccessful": is_usable,
        "exitCode": exit_code,
        "toolExecutionNotifications": notes,
    }
    run = {"tool": {"driver": driver}, "invocations": [invocation], "results": results}
    return {"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}


def _location(finding: Finding, file: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": safe(finding.where)}]}
    split = _split_origin(finding.origin)
    path: PurePath | None = PurePath(split[0]) if split else file
    if path is None:
        return found
    # An absolute file's URI, or a relative reference: from the root of the sources.
    uri = path.as_uri() if path.is_absolute() else quote(str(path), errors="backslashreplace")
    physical: dict[str, Any] = {"artifactLocation": {"uri": uri}}
    if split:
        physical["region"] = {"startLine": int(split[1]), "startColumn": int(split[2])}
    return found | {"physicalLocation": physical}


def _junit(report: Report, *, strict: bool) -> str:
    """Return a test for each rule: failed with errors (``strict``: and warnings), skipped where it
    was not checked. Findings that fail nothing stand in the output of a test that passed.
    """
    suite = "pdlaunch check-config"
    cases = {
        rule.code: junit_case(f"{suite}.{family(rule)}", f"{rule.code} {rule.title}")
        for rule in report.rules
    } or {UNUSABLE: junit_case(f"{suite}.Input", "input The input can be used.")}
    for code, case in cases.items():
        found = [finding for finding in report.findings if finding.rule == code]
        if not found:
            continue
        lines = [f"{each.severity} {code} {place(each)}: {each.message}" for each in found]
        text = "\n".join(
            f"{line}\nfix: {each.fix}" for line, each in zip(lines, found, strict=True)
        )
        severity = found[0].severity
        if severity == "error" or (strict and severity == "warning"):
            tag, kind = ("error", UNUSABLE) if code == UNUSABLE else ("failure", severity)
            first = safe(f"{place(found[0])}: {found[0].message}")
            ElementTree.SubElement(case, tag, type=kind, message=first).text = safe(text)
        else:
            ElementTree.SubElement(case, "system-out").text = safe(text)
    for item in report.not_checked:
        needs = f"not checked: needs {', '.join(item.needs)}: {safe(item.reason)}"
        ElementTree.SubElement(cases[item.rule], "skipped", message=needs)
    root = ElementTree.Element("testsuites")
    root.append(junit_suite(suite, list(cases.values())))
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'


def junit_case(group: str, name: str, seconds: float = 0.0) -> ElementTree.Element:
    """Return a test case, to which its outcome is added."""
    return ElementTree.Element("testcase", classname=group, name=name, time=f"{seconds:g}")


def junit_suite(name: str, cases: Sequence[ElementTree.Element]) -> ElementTree.Element:
    """Return a test suite as JUnit XML, which CI services show as tests."""
    counts = {
        name: str(sum(case.find(tag) is not None for case in cases))
        for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))
    }
    seconds = sum(float(case.get("time", "0")) for case in cases)
    attributes = {"name": name, "tests": str(len(cases)), **counts, "time": f"{seconds:g}"}
    suite = ElementTree.Element("testsuite", attributes)
    suite.extend(cases)
    return suite
