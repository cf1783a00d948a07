"""``reconcile`` is pure: states in, actions out."""

from __future__ import annotations

import math

import pytest

from pdlaunch.launch.engines.native import NativeEngine
from pdlaunch.launch.pairs import Pairs
from pdlaunch.launch.reconcile import reconcile
from pdlaunch.launch.state import Desired, Goal, Observed, Start, Timing
from pdlaunch.launch.status import LaunchPhase, ProcessState
from tests.launch.fakes import make_plan


@pytest.fixture
def launch() -> tuple[Desired, Observed]:
    """Two engines of both roles, all of whose processes are ready."""
    plan = make_plan(num_prefill=0, num_decode=0, num_both=2)
    seen = Observed(Pairs(plan, NativeEngine()), started_at=0.0)
    seen.add(plan.processes)
    wanted = Desired(Timing(), {name: Goal() for name in seen.engines})
    assert reconcile(wanted, seen, 0.0)[0] == [Start(unit.name) for unit in seen.units]
    for unit in seen.units:
        unit.begin(kill_at=600)
        unit.ready_at = 0.0
        for process in unit.processes:
            process.state = ProcessState.READY
    return wanted, seen


def test_what_is_as_it_should_be_needs_nothing(launch: tuple[Desired, Observed]) -> None:
    wanted, seen = launch
    for unit in seen.units:
        unit.kill_at = None
    assert reconcile(wanted, seen, 0.0) == ([], math.inf)
    assert seen.phase is LaunchPhase.READY


def test_what_has_died_at_once_is_due_at_once_after_its_delay_and_is_asked_for_once(
    launch: tuple[Desired, Observed],
) -> None:
    wanted, seen = launch
    reconcile(wanted, seen, 0.0)
    for unit in seen.units[:2]:
        unit.kill_at = None
        unit.cause, unit.died_at = unit.processes[0], 1.0
        unit.processes[0].state = ProcessState.FAILED
    reconcile(wanted, seen, 1.0)
    assert reconcile(wanted, seen, 1.0) == ([], 1.5)
    assert reconcile(wanted, seen, 1.5)[0] == [Start(unit.name) for unit in seen.units[:2]]
