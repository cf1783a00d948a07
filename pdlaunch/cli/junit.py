"""Writes the report of a check as JUnit XML, which CI services show as tests: one for each rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from pdlaunch.checks.rule import Finding
from pdlaunch.checks.run import Report, family
from pdlaunch.cli.findings import place
from pdlaunch.cli.output import safe
from pdlaunch.config.problems import Problem

_SUITE = "pdlaunch check-config"


def report_junit(report: Report, *, strict: bool) -> str:
    """Return a test for each rule: failed with errors (``strict``: and warnings), skipped where it
    was not checked. Findings that fail nothing stand in the output of a test that passed.
    """
    cases = [_case(rule.code, family(rule), rule.title) for rule in report.rules]
    by_code = {rule.code: case for rule, case in zip(report.rules, cases, strict=True)}
    for code, case in by_code.items():
        found = [finding for finding in report.findings if finding.rule == code]
        if not found:
            continue
        fails = found[0].severity == "error" or (strict and found[0].severity == "warning")
        text = "\n".join(map(_text, found))
        if fails:
            first = safe(f"{place(found[0])}: {found[0].message}")
            _add(case, "failure", text, type=found[0].severity, message=first)
        else:
            _add(case, "system-out", text)
    for item in report.not_checked:
        needs = f"needs {', '.join(item.needs)}: {safe(item.reason)}"
        _add(by_code[item.rule], "skipped", message=f"not checked: {needs}")
    return _document(cases)


def problems_junit(problems: Iterable[Problem]) -> str:
    """Return one test, which failed because the configuration cannot be used."""
    case = _case("input", "Input", "The input can be used.")
    lines = [safe(str(problem)) for problem in problems]
    _add(case, "error", "\n".join(lines), type="input", message=lines[0] if lines else "unusable")
    return _document([case])


def _case(code: str, group: str, title: str) -> ElementTree.Element:
    return ElementTree.Element(
        "testcase", classname=f"{_SUITE}.{group}", name=f"{code} {title}", time="0"
    )


def _text(finding: Finding) -> str:
    text = f"{finding.severity} {finding.rule} {place(finding)}: {finding.message}"
    return safe(f"{text}\nfix: {finding.fix}")


def _add(case: ElementTree.Element, tag: str, text: str | None = None, **attributes: str) -> None:
    ElementTree.SubElement(case, tag, attributes).text = text


def _document(cases: Sequence[ElementTree.Element]) -> str:
    counts = {
        name: str(sum(case.find(tag) is not None for case in cases))
        for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))
    }
    attributes = {"name": _SUITE, "tests": str(len(cases)), **counts, "time": "0"}
    suite = ElementTree.Element("testsuite", attributes)
    suite.extend(cases)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'
