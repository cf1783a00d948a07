"""Writes the report of a check as SARIF 2.1.0, which code-scanning services read.

Source: OASIS Standard "Static Analysis Results Interchange Format (SARIF) Version 2.1.0".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from pdlaunch import __version__
from pdlaunch.checks.rule import Finding, Rule, Severity
from pdlaunch.checks.run import Report
from pdlaunch.cli.findings import split_origin
from pdlaunch.cli.output import safe
from pdlaunch.config.problems import Problem

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}
_UNUSABLE = "input"


def report_sarif(report: Report, exit_code: int, file: Path | None) -> str:
    """Return the log of one run: rules, findings, and a note for each rule that was not checked.

    A finding whose setting stands in no file is put at ``file``, the configuration that was given.
    """
    indices = {rule.code: index for index, rule in enumerate(report.rules)}
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
            "level": _LEVELS[finding.severity],
            "message": {"text": safe(f"{finding.message}. Fix: {finding.fix}")},
            "locations": [_location_of(finding, file)],
        }
        for finding in report.findings
    ]
    return _log(map(_descriptor, report.rules), results, exit_code, notes)


def problems_sarif(problems: Iterable[Problem], exit_code: int, file: Path | None) -> str:
    """Return the log of a run whose configuration could not be used."""
    rule = {"id": _UNUSABLE, "shortDescription": {"text": "The input cannot be used."}}
    results = [
        {
            "ruleId": _UNUSABLE,
            "ruleIndex": 0,
            "level": "error",
            "message": {"text": safe(str(problem))},
            "locations": [_location(problem.field or "", file, problem.line, problem.column)],
        }
        for problem in problems
    ]
    return _log([rule], results, exit_code, [], usable=False)


def _log(
    rules: Iterable[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    exit_code: int,
    notes: Sequence[dict[str, Any]],
    *,
    usable: bool = True,
) -> str:
    driver = {"name": "pdlaunch check-config", "version": __version__, "rules": list(rules)}
    invocation = {
        "executionSuccessful": usable,
        "exitCode": exit_code,
        "toolExecutionNotifications": notes,
    }
    run = {"tool": {"driver": driver}, "invocations": [invocation], "results": results}
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _descriptor(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.why or rule.title},
        "help": {"text": f"Fix: {rule.fix}\nSource: {rule.source}"},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
    }


def _location_of(finding: Finding, file: Path | None) -> dict[str, Any]:
    path, line, column = split_origin(finding.origin)
    if path is None or line is None or column is None:
        return _location(finding.where, file, None, None)
    return _location(finding.where, Path(path), int(line), int(column))


def _location(name: str, file: Path | None, line: int | None, column: int | None) -> dict[str, Any]:
    location: dict[str, Any] = {}
    if file is not None:
        place: dict[str, Any] = {"artifactLocation": {"uri": _uri(file)}}
        if line is not None:
            place["region"] = {"startLine": line, "startColumn": column or 1}
        location["physicalLocation"] = place
    if name:
        location["logicalLocations"] = [{"fullyQualifiedName": safe(name)}]
    return location


def _uri(file: PurePath) -> str:
    """Return an absolute file's URI, or a relative reference: from the root of the sources."""
    return (
        file.as_uri() if file.is_absolute() else quote(file.as_posix(), errors="backslashreplace")
    )
