"""The line that ``pdlaunch serve`` says every ten seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pdlaunch.cli.live import StatusLine
from pdlaunch.cli.status import status_line
from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.status import LaunchPhase, LaunchStatus
from pdlaunch.protocol.status import DeploymentStatus
from tests.cli.deployment_server import deployment, engine, rates
from tests.launch.fakes import FakeObserver

LAUNCH = LaunchStatus(LaunchPhase.READY, ())
DRAINING = LaunchStatus(LaunchPhase.DRAINING_ROUTER, ())
STOPPING = LaunchStatus(LaunchPhase.STOPPING, ())


class Router:
    """Tells ``status``, and counts how often."""

    def __init__(self, status: DeploymentStatus) -> None:
        self.status: DeploymentStatus | None = status
        self.num_reads = 0
        self.was_read = threading.Event()

    def __call__(self) -> DeploymentStatus:
        self.num_reads += 1
        self.was_read.set()
        if self.status is None:
            raise PdlaunchError("it is restarted")
        return self.status


def idle(**fields: object) -> DeploymentStatus:
    values = {"requests": 0, "in_flight": 0, "rates": rates(0.0, 0.0), "gone": []} | fields
    return deployment(**values)


def test_it_says_rates_load_caches_pulls_and_errors() -> None:
    status = deployment(
        engine("decode-0", "decode", kv_usage=0.5),
        engine("decode-1", "decode", kv_usage=0.1),
        engine("prefill-0", "prefill", is_down=True, state="starting"),
        errors=5,
    )
    assert status_line(status, 3) == (
        "4 requests/s, 40 tokens/s, 9 running, 3 waiting, KV prefill 25% decode 30%, "
        "pulls 3.00 GB/s, 2 errors, down: prefill-0, decode-7"
    )


def test_nothing_is_said_while_nothing_has_changed() -> None:
    view, router = FakeObserver(), Router(idle())
    line = StatusLine(view, router)
    line.tell()
    assert view.notes == [], "nobody has asked for anything yet"
    router.status = deployment()
    line.tell()
    line.tell()
    router.status = None
    line.tell()
    assert len(view.notes) == 1
    router.status = idle(requests=12)
    line.tell()
    line.tell()
    assert [note.split(",")[0] for note in view.notes] == ["4 requests/s", "0 requests/s"]


def until(condition: Callable[[], object]) -> None:
    ticks = threading.Event()
    for _ in range(2000):
        if condition():
            return
        ticks.wait(0.01)
    pytest.fail("it did not happen")


def test_it_speaks_from_ready_to_the_end_and_counts_a_drain_down() -> None:
    view, router = FakeObserver(), Router(deployment(gone=[]))
    with StatusLine(view, router, every_s=0.01) as line:
        line.changed(LAUNCH)
        assert router.num_reads == 0
        line.ready(LAUNCH)
        until(lambda: view.notes)
        assert view.ready_count == 1
        line.note("a death")
        line.changed(DRAINING)
        until(lambda: "draining: 3 requests left" in view.notes)
        router.status = deployment(in_flight=1)
        until(lambda: "draining: 1 request left" in view.notes)
        line.changed(STOPPING)
        until(lambda: not line._thread.is_alive())
    assert [note.partition(" ")[0] for note in view.notes] == [
        *("4", "a", "draining:", "draining:")
    ]
    assert view.statuses == [LAUNCH, DRAINING, STOPPING]


def test_it_is_ready_once_the_router_takes_requests() -> None:
    view, router = FakeObserver(), Router(idle(state="starting"))
    with StatusLine(view, router) as line:
        line.ready(LAUNCH)
        until(lambda: router.num_reads > 1)
        router.status = None
        router.was_read.clear()
        assert router.was_read.wait(20)
        assert view.ready_count == 0
        router.status = idle()
        until(lambda: view.ready_count)
    line._thread.join(20)
    assert view.ready_count == 1


def test_a_launch_that_stops_before_is_never_ready() -> None:
    view, router = FakeObserver(), Router(idle(state="starting"))
    with StatusLine(view, router) as line:
        line.ready(LAUNCH)
        until(lambda: router.num_reads)
        line.changed(DRAINING)
        router.status = idle()
        line.changed(STOPPING)
    line._thread.join(20)
    assert view.ready_count == 0
