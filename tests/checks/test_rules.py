from dataclasses import replace

import pytest

from pdlaunch.checks.run import all_rules
from pdlaunch.config.settings import all_settings, split_path
from tests.checks import (
    cases_of_engines,
    cases_of_machines,
    cases_of_memory,
    cases_of_placement,
    cases_of_settings,
)
from tests.checks.contexts import CPU, GB200, GPU, on

CASES = (
    cases_of_settings.CASES
    | cases_of_memory.CASES
    | cases_of_machines.CASES
    | cases_of_engines.CASES
    | cases_of_placement.CASES
)

RULES, SETTINGS = all_rules(), all_settings()


@pytest.fixture(params=sorted(RULES))
def rule(request):
    return RULES[request.param]


def test_every_rule_fires_and_stays_quiet(rule):
    """Each finding says what is wrong and how to repair it; none comes without the rule's facts."""
    case = CASES[rule.code]
    assert case.fires
    assert case.quiet
    for context in case.fires:
        found = rule.apply(context)
        assert found
        for finding in found:
            assert finding.message
            assert finding.fix or finding.severity == "info"
            assert (
                finding.where in SETTINGS
                or ".".join(split_path(finding.where)[:-1]) in SETTINGS
                or " " in finding.where
                or finding.where == "/dev/shm"
            )
        for need in rule.needs:
            assert rule.apply(replace(context, missing={need: "not probed"})) == []
    for context in case.quiet:
        assert rule.apply(context) == []


@pytest.mark.parametrize("machine", [CPU, GPU, GB200], ids=["cpu", "h200", "gb200"])
def test_healthy_set_ups_have_no_findings(rule, machine):
    assert rule.apply(on(machine)) == []


def test_no_rule_raises_whatever_is_wrong_elsewhere():
    for case in CASES.values():
        for context in (*case.fires, *case.quiet):
            for each in RULES.values():
                each.apply(context)
