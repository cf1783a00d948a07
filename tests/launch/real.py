"""Runs plans of fake children for real: processes, sockets, signals."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import zmq

from pdlaunch.launch.bootstraps import Bootstraps
from pdlaunch.launch.engines.native import NativeEngine
from pdlaunch.launch.launch import LaunchOutcome, supervise
from pdlaunch.launch.state import Timing
from pdlaunch.launch.status import Observer
from pdlaunch.planning.plan import Plan, ProcessSpec
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.run_dirs import new_run_dir
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext, new_launch_keys
from tests.launch.fakes import FakePlaces, make_plan

FAKE_CHILD = Path(__file__).with_name("fake_child.py")


class FakeBootstraps(Bootstraps):
    def __init__(self, keys: LaunchKeys, control: str, run_dir: Path) -> None:
        self._keys = keys
        self._control = control
        self._run_dir = run_dir

    def prepare(self) -> None:
        pass

    def make(self, spec: ProcessSpec, incarnation: int) -> Bootstrap:
        return Bootstrap(
            name=spec.name,
            incarnation=incarnation,
            control=self._control,
            keys=self._keys,
            run_dir=str(self._run_dir),
            log_level="info",
        )


def real_plan(words: Mapping[str, str] | None = None, **shape: int) -> Plan:
    """Plan fake children; ``words`` say by process name how it misbehaves."""
    plan = make_plan(**shape)
    own = words or {}
    processes = [
        msgspec.structs.replace(
            p, command=(sys.executable, str(FAKE_CHILD), *own.get(p.name, "").split())
        )
        for p in plan.processes
    ]
    return Plan(conversions=plan.conversions, processes=tuple(processes))


def run_plan(
    plan: Plan,
    observer: Observer,
    folder: Path,
    timing: Timing,
    lifeline: int | None = None,
) -> LaunchOutcome:
    keys = new_launch_keys()
    with new_run_dir() as run_dir, contextlib.closing(SecureContext(keys)) as context:
        control, endpoint = context.listen(zmq.ROUTER, f"ipc://{run_dir}/control")
        return supervise(
            plan,
            NativeEngine(),
            control,
            FakeBootstraps(keys, endpoint, run_dir),
            FakePlaces(),
            observer,
            timing,
            folder,
            lifeline,
        )
