"""This machine as a host spawns, hears, signals and buries processes, and waits for nothing."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from pdlaunch.hosts.children import Children
from pdlaunch.hosts.host import MessageReceived, ProcessExited
from pdlaunch.hosts.local import LocalHost
from pdlaunch.process.engine_ports import EnginePorts
from pdlaunch.protocol.control import Progress
from pdlaunch.resolve.plan import ProcessSpec

pytestmark = pytest.mark.processes


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LocalHost]:
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as control,
        contextlib.closing(Children(tmp_path)) as children,
    ):
        yield LocalHost(control, children, EnginePorts())


def child(code: str, *, name: str = "convert-0") -> ProcessSpec:
    return ProcessSpec(name=name, kind="convert", unit=name, command=(sys.executable, "-c", code))


def await_exit(host: LocalHost) -> list[ProcessExited]:
    """Wait until ``sources`` say that there is something, as the supervisor's loop does."""
    poller = zmq.Poller()
    for source in host.sources:
        poller.register(source, zmq.POLLIN)
    assert poller.poll(180_000)
    return host.exits()


def test_an_end_is_told_once_with_its_exit_code(host: LocalHost) -> None:
    host.spawn(child("raise SystemExit(3)"), 2, None)
    assert await_exit(host) == [ProcessExited("convert-0", 2, 3)]
    assert host.exits() == []


def test_children_are_told_apart(host: LocalHost) -> None:
    host.spawn(child("input()", name="waits"), 1, None)
    host.spawn(child("raise SystemExit(0)", name="ends"), 1, None)
    assert await_exit(host) == [ProcessExited("ends", 1, 0)]
    host.signal("waits", signal.SIGKILL)
    assert await_exit(host) == [ProcessExited("waits", 1, -signal.SIGKILL)]
    host.signal("waits", signal.SIGKILL)


def test_what_cannot_be_started_has_ended_at_once(host: LocalHost) -> None:
    host.spawn(ProcessSpec(name="r", kind="router", unit="r", command=("/no/such",)), 1, None)
    assert host.poll_s == 0
    assert host.exits() == [ProcessExited("r", 1, 127)]
    assert host.poll_s > 0
    assert "No such file" in host.log_path("r").read_text()


def test_progress_of_a_conversion_is_read_from_its_log(host: LocalHost) -> None:
    code = "print('[ 40%] reading weights\\na warning', flush=True); input()"
    host.spawn(child(code), 1, None)
    heard: list[MessageReceived] = []
    while not heard:
        assert 0 < host.poll_s < 60
        heard = host.messages()
    expected = Progress(text="reading weights", fraction=0.4)
    assert heard == [MessageReceived("convert-0", expected)]
    assert host.messages() == []
    host.signal("convert-0", signal.SIGKILL)
    await_exit(host)
    assert host.poll_s == float("inf")
