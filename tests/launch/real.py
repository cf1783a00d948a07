"""Runs plans of fake children for real: processes, sockets, signals."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import zmq

from pdlaunch.launch.engines.native import NativeEngine
from pdlaunch.launch.hosts.local import Children, LocalHost
from pdlaunch.launch.launch import LaunchOutcome, run
from pdlaunch.launch.state import Timing
from pdlaunch.launch.status import Observer
from pdlaunch.launch.supervisor import Supervisor
from pdlaunch.planning.plan import Plan
from pdlaunch.protocol.process.engine_ports import EnginePorts
from pdlaunch.protocol.process.run_dirs import new_run_dir
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from tests.launch.fakes import FakeBootstraps, FakePlaces, make_plan

FAKE_CHILD = Path(__file__).with_name("fake_child.py")


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
    with (
        new_run_dir() as run_dir,
        contextlib.closing(SecureContext(keys)) as context,
        contextlib.closing(EnginePorts()) as engine_ports,
        contextlib.closing(Children(folder)) as children,
    ):
        control, endpoint = context.listen(zmq.ROUTER, f"ipc://{run_dir}/control")
        host = LocalHost(control, children, engine_ports)
        supervisor = Supervisor(
            plan,
            NativeEngine(),
            host,
            FakeBootstraps(keys, endpoint, str(run_dir)),
            FakePlaces(),
            observer,
            timing,
            time.monotonic,
            close_listeners=lambda: None,
        )
        return run(supervisor, host, lifeline)
