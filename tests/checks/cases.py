"""For every rule: contexts in which it fires, and near misses in which it stays quiet."""

from tests.checks import (
    cases_of_engines,
    cases_of_far_pairs,
    cases_of_machines,
    cases_of_memory,
    cases_of_placement,
    cases_of_settings,
)
from tests.checks.case import Case

CASES: dict[str, Case] = {
    **cases_of_settings.CASES,
    **cases_of_memory.CASES,
    **cases_of_machines.CASES,
    **cases_of_engines.CASES,
    **cases_of_placement.CASES,
    **cases_of_far_pairs.CASES,
}
