"""Runs the rules over a resolved launch; ``check-config`` shows what they find."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from pdlaunch.checks.context import Context, Need, Probes, make_context
from pdlaunch.checks.rule import Finding, Rule, Severity
from pdlaunch.config.sources import Origin
from pdlaunch.planning.effective import effective_values
from pdlaunch.planning.resolve import ResolvedLaunch

SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass(frozen=True, slots=True)
class NotChecked:
    """Names a rule that could say nothing here."""

    rule: str
    title: str
    needs: tuple[Need, ...]
    """The facts that are missing."""
    reason: str
    """The reason why the first of them is missing."""


@dataclass(frozen=True, slots=True)
class Report:
    """Holds the outcome of a check."""

    findings: tuple[Finding, ...]
    """Errors first, then warnings and infos; by code."""
    not_checked: tuple[NotChecked, ...]
    rules: tuple[Rule, ...]
    """The rules that were applied, those not checked included."""
    resolved: Mapping[str, object]
    """The values that were judged; plain JSON without secrets."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def is_ok(self, *, strict: bool = False) -> bool:
        """Return True without errors; with ``strict`` only without warnings too."""
        return not any(
            finding.severity == "error" or (strict and finding.severity == "warning")
            for finding in self.findings
        )


def run_checks(
    launch: ResolvedLaunch,
    origins: Mapping[str, Origin],
    probes: Probes,
    *,
    rules: Iterable[Rule],
    family: str = "PD",
) -> Report:
    """Apply every rule whose code begins with ``family``. ``rules``: those of the engine kind.

    Rules that need what was not probed are listed as not checked. ``serve`` calls with
    ``family="PD5"`` and the measured pairs after the handshake.
    """
    whole = make_context(launch, origins, probes)
    hosts = {
        host.name: make_context(launch.on_host(host), origins, probes)
        for host in (launch.engine_hosts if launch.spans_hosts else ())
    }
    applied = [rule for rule in rules if rule.code.startswith(family)]
    findings: list[Finding] = []
    not_checked: list[NotChecked] = []
    for rule in applied:
        contexts = hosts if rule.is_of_machine and hosts else {"": whole}
        findings += _of_hosts({name: apply_rule(rule, one) for name, one in contexts.items()})
        gaps = {
            name: missing for name, one in contexts.items() if (missing := missing_facts(rule, one))
        }
        for name, missing in list(gaps.items())[:1]:
            reason = contexts[name].missing[missing[0]]
            on = f"{', '.join(gaps)}: " if name else ""
            not_checked.append(NotChecked(rule.code, rule.title, missing, f"{on}{reason}"))
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), finding.rule))
    return Report(
        tuple(findings), tuple(not_checked), tuple(applied), effective_values(launch, origins)
    )


def _of_hosts(found: Mapping[str, Sequence[Finding]]) -> Iterator[Finding]:
    """Yield what was found on hosts, once what several have in common; the message names them."""
    hosts: dict[Finding, list[str]] = {}
    for name, findings in found.items():
        for finding in findings:
            hosts.setdefault(finding, []).append(name)
    for finding, names in hosts.items():
        on = ", ".join(filter(None, names))
        yield replace(finding, message=f"on {on}: {finding.message}") if on else finding


def apply_rule(rule: Rule, context: Context) -> list[Finding]:
    """Return what one rule finds; equal findings of both roles are one.

    Empty where the rule lacks a fact.
    """
    if missing_facts(rule, context):
        return []
    # A setting of the top level is found once for each role: dict keys keep the first.
    found = dict.fromkeys(rule.check(context))
    return [
        Finding(
            rule.code,
            rule.severity,
            item.where,
            item.message,
            item.fix or rule.fix,
            context.origins[item.where].detail if context.given(item.where) else "",
        )
        for item in found
    ]


def missing_facts(rule: Rule, context: Context) -> tuple[Need, ...]:
    """Return the facts without which a rule can say nothing here; empty: it can."""
    return tuple(need for need in rule.needs if need in context.missing)
