"""Every rule is seen by ``pdlaunch check-config``, and gone after each fix that its page gives."""

import re
from dataclasses import replace

import pytest

from pdlaunch.checks.registry import all_rules
from pdlaunch.config.settings import flag_name, variable_name
from pdlaunch.launch.engines.kind import OF_RUNNING_ENGINES
from tests.checks import (
    fires_allocators,
    fires_configuration,
    fires_engines,
    fires_far_pairs,
    fires_libraries,
    fires_machine,
    fires_memory,
    fires_network,
    fires_pairs,
    fires_placement,
    fires_transport,
    fires_ucx,
)
from tests.checks.firing import check_config, found_by_check_config, write_models

CASES = [
    *fires_configuration.CASES,
    *fires_memory.CASES,
    *fires_allocators.CASES,
    *fires_pairs.CASES,
    *fires_placement.CASES,
    *fires_far_pairs.CASES,
    *fires_libraries.CASES,
    *fires_machine.CASES,
    *fires_ucx.CASES,
    *fires_network.CASES,
    *fires_transport.CASES,
    *fires_engines.CASES,
]
IMPORTS = [*fires_libraries.IMPORTS, *fires_ucx.TRIALS, *fires_engines.ASKED]
CODES = {case.code for case in [*CASES, *IMPORTS]}
SET = re.compile(r"(?:set|or) ([a-z_.]+) to (\d[\d.]*[A-Za-z]*)(?: |$)")
"""What a finding says to do, where it names a setting and a value."""
SEEN_IN_A_LAUNCH = {"PD501", "PD505"}
"""Rules on measurements that ``tests/e2e/test_checks.py`` sees in a launch on a CPU."""
SEEN_BY_DOCTOR = OF_RUNNING_ENGINES
"""Rules that ``tests/cli/test_doctor.py`` sees the other command name."""


def named(case):
    return pytest.param(case, id=case.code)


def starting_processes(case):
    return pytest.param(case, id=case.code, marks=pytest.mark.processes)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def test_every_rule_has_a_case():
    assert sorted(CODES | SEEN_BY_DOCTOR) == sorted(all_rules())
    assert not CODES & SEEN_BY_DOCTOR


def test_what_only_hardware_can_show_is_marked():
    made_up = {case.code for case in CASES if case.broken.measured}
    assert made_up == SEEN_IN_A_LAUNCH | {case.code for case in CASES if case.only_on}


@pytest.mark.parametrize("case", [*map(named, CASES), *map(starting_processes, IMPORTS)])
def test_it_fires_and_the_fixes_of_its_page_end_it(case, models):
    rule = all_rules()[case.code]
    findings = found_of(case, case.broken, models)
    assert findings
    assert {item["severity"] for item in findings} == {rule.severity}
    check_values(case, findings, models)
    assert case.fixes or rule.severity == "info", "what is wrong can be mended"
    for words, fixed in case.fixes.items():
        assert words in rule.fix, "the page of the rule says something else"
        found = found_by_check_config(fixed, models)
        assert rule.code not in found, words
        assert "error" not in found.values(), (words, found)


def check_values(case, findings, models):
    """Do what each finding says, where it names settings and values: any of them ends it."""
    for place, fix in [(item["where"].partition(" ")[0], item["fix"]) for item in findings]:
        for name, value in SET.findall(fix):
            path = place if name == "it" or place.endswith(f".{name}") else name
            fixed = replace(
                case.broken,
                flags=without_flag(case.broken.flags, flag_name(path)),
                environ={**case.broken.environ, variable_name(path): value},
            )
            still = [item["where"].partition(" ")[0] for item in found_of(case, fixed, models)]
            assert place not in still, f"{path} is {value}, as it says"


def found_of(case, setup, models):
    findings = check_config(setup, models)["findings"]
    return [item for item in findings if item["rule"] == case.code]


def without_flag(flags, name):
    if name not in flags:
        return flags
    at = flags.index(name)
    return flags[:at] + flags[at + 2 :]
