"""This machine as a host spawns, hears, signals and buries processes, and waits for nothing."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from pdlaunch.launch.hosts.local import LocalHost, MessageReceived, ProcessExited
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import Address, Register, to_supervisor
from pdlaunch.protocol.process.engine_ports import EnginePorts, bind_to_share
from pdlaunch.protocol.process.step_record import LastStep
from tests.e2e.waiting import await_true
from tests.launch.fakes import bootstrap

pytestmark = pytest.mark.processes


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LocalHost]:
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as control,
        contextlib.closing(LocalHost(control, tmp_path, EnginePorts())) as host,
    ):
        yield host


def start(host: LocalHost, name: str, code: str, incarnation: int = 1) -> None:
    command = (sys.executable, "-c", code)
    spec = ProcessSpec(name=name, kind="server", unit=name, command=command)
    assert host.spawn(spec, incarnation, bootstrap(name)) is None


def await_exit(host: LocalHost) -> list[ProcessExited]:
    """Wait until ``sources`` say that there is something, as the supervisor's loop does."""
    poller = zmq.Poller()
    for source in host.sources:
        poller.register(source, zmq.POLLIN)
    assert poller.poll(180_000)
    return host.exits()


def test_ends_are_told_once_with_exit_code_or_signal(host: LocalHost) -> None:
    start(host, "waits", "input(); input()")
    start(host, "ends", "raise SystemExit(3)", 2)
    assert await_exit(host) == [ProcessExited("ends", 2, 3)]
    assert host.exits() == []
    host.signal("waits", signal.SIGKILL)
    assert await_exit(host) == [ProcessExited("waits", 1, -signal.SIGKILL)]
    host.signal("waits", signal.SIGKILL)


def test_the_end_of_what_cannot_be_started_is_returned(host: LocalHost) -> None:
    spec = ProcessSpec(name="r", kind="router", unit="r", command=("/no/such",))
    assert host.spawn(spec, 1, bootstrap("r")) == ProcessExited("r", 1, 127)
    assert "No such file" in host.log_path("r").read_text()


def test_the_end_of_any_rank_tells_what_rank_0_wrote_last(host: LocalHost) -> None:
    code = (
        "import json, sys\n"
        "from pdlaunch.protocol.process.step_record import SUSPECT_BIT, StepRecord\n"
        "bootstrap = json.loads(sys.stdin.readline())\n"
        "if bootstrap['step_record'] >= 0:\n"
        "    StepRecord(bootstrap['step_record']).write([7, 5 | SUSPECT_BIT])\n"
        "print('written', flush=True); sys.stdin.readline()"
    )
    names = ["decode-0/rank-0", "decode-0/rank-1"]
    for rank, name in enumerate(names):
        command = (sys.executable, "-c", code)
        spec = ProcessSpec(
            name=name, kind="rank", unit="u", engine="decode-0", tp_rank=rank, command=command
        )
        host.spawn(spec, 1, bootstrap(name))
        await_true(lambda name=name: "written" in host.log_path(name).read_text(), "it has written")
    host.signal(names[1], signal.SIGSEGV)
    (gone,) = await_exit(host)
    assert (gone.name, gone.last_step) == (names[1], LastStep(frozenset({7, 5}), frozenset({5})))


def test_ports_of_servers_are_kept_once_they_listen(tmp_path: Path) -> None:
    """An engine that listens only later would find its port taken."""
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as control,
        context.socket(zmq.DEALER) as server,
        contextlib.closing(EnginePorts()) as engine_ports,
        bind_to_share("127.0.0.1", 0, is_kept=False) as bound,
    ):
        host = LocalHost(control, tmp_path, engine_ports)
        control.bind("inproc://control")
        server.identity = b"decode-0"
        server.connect("inproc://control")
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        for listens in (False, True):
            register = Register(
                name="decode-0", incarnation=1, address=Address(http=url), listens=listens
            )
            server.send(to_supervisor.encode(register))
            assert control.poll(180_000)
            assert host.messages() == [MessageReceived("decode-0", register)]
            assert ("decode-0" in engine_ports) == listens
        host.forget("decode-0")
        assert "decode-0" not in engine_ports


def test_what_a_process_has_started_ends_with_it(host: LocalHost) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    start(host, "parent", code)
    assert await_exit(host) == [ProcessExited("parent", 1, 0)]
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(host.log_path("parent").read_text())).wait(180)
