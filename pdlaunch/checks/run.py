"""Collects the rules, and runs them over a resolved launch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pdlaunch.checks import (
    engine_rules,
    machine_rules,
    memory_rules,
    pair_rules,
    running_rules,
    settings_rules,
)
from pdlaunch.checks.probed import Probes
from pdlaunch.checks.rule import SEVERITIES, Finding, Need, Rule, make_context
from pdlaunch.planning.resolve import ResolvedLaunch, effective_values

NO_VLLM = "PD611"
# A new rule takes a number that no rule ever had, since reports name rules by their numbers.
FAMILIES = {
    "PD1": "Configuration",
    "PD2": "Memory",
    "PD3": "Prefill and decode pairs",
    "PD4": "Environment",
    "PD5": "Transport",
    "PD6": "Other engines",
}
_RULES = (
    *settings_rules.RULES,
    *memory_rules.RULES,
    *pair_rules.RULES,
    *machine_rules.RULES,
    *engine_rules.RULES,
    *running_rules.RULES,
)


def all_rules() -> dict[str, Rule]:
    """Return every rule, in the order of the codes."""
    by_code = {rule.code: rule for rule in sorted(_RULES, key=lambda rule: rule.code)}
    assert len(by_code) == len(_RULES), "two rules share a code"
    return by_code


def family(rule: Rule) -> str:
    """Return the name of the rule's family."""
    return FAMILIES[rule.code[:3]]


@dataclass(frozen=True, slots=True)
class NotChecked:
    """A rule that could not be checked."""

    rule: str
    needs: tuple[Need, ...]
    reason: str  # the reason why the first of these facts is missing


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a check."""

    findings: tuple[Finding, ...]  # errors first, then warnings and infos; by code
    not_checked: tuple[NotChecked, ...]
    resolved: Mapping[str, object]  # the values that were judged; plain JSON without secrets
    measured: str = ""  # result of `--probe`: the pair, or why no pair was measured

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def is_ok(self, *, strict: bool = False) -> bool:
        """Return True if there are no errors; with ``strict``, no warnings either."""
        failing = ("error", "warning") if strict else ("error",)
        return not any(finding.severity in failing for finding in self.findings)


def run_checks(
    launch: ResolvedLaunch, origins: Mapping[str, str], probes: Probes, *, rules: Iterable[Rule]
) -> Report:
    """Apply ``rules``. A rule that needs an unknown fact is listed as not checked."""
    whole = {"": make_context(launch, origins, probes)}
    hosts = {
        host.name: make_context(launch.on_host(host), origins, probes)
        for host in (launch.engine_hosts if launch.spans_hosts else ())
    }
    findings: list[Finding] = []
    not_checked: list[NotChecked] = []
    for rule in rules:
        # A rule about machines judges each host with its engines; others judge the launch once.
        contexts = (hosts if rule.is_of_machine else whole) or whole
        findings += _of_hosts({name: rule.apply(one) for name, one in contexts.items()})
        gaps = [name for name, one in contexts.items() if rule.missing(one)]
        if gaps:
            first = contexts[gaps[0]]
            missing = rule.missing(first)
            on = f"{', '.join(gaps)}: " if gaps[0] else ""
            reason = f"{on}{first.missing[missing[0]]}"
            not_checked.append(NotChecked(rule.code, missing, reason))
    # If vLLM is missing, all other findings about vLLM would be guesses.
    findings = [each for each in findings if each.rule == NO_VLLM] or findings
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), finding.rule))
    return Report(tuple(findings), tuple(not_checked), effective_values(launch))


def _of_hosts(found: Mapping[str, Sequence[Finding]]) -> Iterator[Finding]:
    """Yield each finding once; its message names the hosts on which it was found."""
    hosts: dict[Finding, list[str]] = {}
    for name, findings in found.items():
        for finding in findings:
            hosts.setdefault(finding, []).append(name)
    for finding, names in hosts.items():
        on = ", ".join(filter(None, names))
        yield replace(finding, message=f"on {on}: {finding.message}") if on else finding
