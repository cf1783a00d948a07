"""A real ``pdlaunch agent`` starts processes, reports them, and leaves none behind."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from pdlaunch.launch.hosts.agent_channel import AgentChannel, HostGroup, Joined, Lost
from pdlaunch.launch.hosts.join import new_join_keys, write_join_files
from pdlaunch.launch.hosts.local import MessageReceived, ProcessExited
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import Failed, Register
from pdlaunch.protocol.process.bootstrap import Bootstrap
from pdlaunch.protocol.process.engine_ports import EnginePorts
from pdlaunch.protocol.sockets import new_launch_keys
from tests.engine.server.conftest import engine_spec, write_model

pytestmark = pytest.mark.processes
TIMEOUT_MS = 180_000
SERVER = ProcessSpec(
    name="prefill-0",
    kind="server",
    unit="prefill-0",
    engine="prefill-0",
    host="a",
    command=("/of/the/supervisor", "-P", "-m", "pdlaunch.engine.server", "--name", "prefill-0"),
)
"""It needs no torch. With a model it waits for its rank until it is told to stop."""


class Launch:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.logs.mkdir()
        (folder / "model").mkdir()
        write_model(folder / "model")
        keys = new_join_keys()
        self.channel = AgentChannel(
            keys,
            "127.0.0.1",
            ["a"],
            timeout_s=60.0,
            print_to=lambda name: self.logs / f"{name.replace('/', '.')}.log",
        )
        self.join = folder / "join"
        write_join_files(self.join, keys, self.channel.endpoint)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.events: list[Joined | Lost] = []
        self.host = HostGroup(
            self.context.socket(zmq.ROUTER),
            self.logs,
            EnginePorts(),
            name="local",
            channel=self.channel,
            on_change=self.events.append,
        )
        self.later: list[MessageReceived | ProcessExited | Joined | Lost] = []
        self.agent = subprocess.Popen(
            [sys.executable, "-m", "pdlaunch", "agent", "--join", str(self.join), "--name", "a"],
            stdout=subprocess.DEVNULL,
        )

    def spawn(self, incarnation: int, spec: ProcessSpec = SERVER, model: str = "model") -> None:
        bootstrap = Bootstrap(
            name=spec.name,
            incarnation=incarnation,
            control="ipc:///of/the/supervisor",
            keys=KEYS,
            run_dir="/of/the/supervisor",
            log_level="info",
            engine_json=engine_spec(self.folder / model).model_dump_json(),
        )
        self.host.spawn(spec, incarnation, bootstrap)

    def until(self, kind: type) -> list[MessageReceived | ProcessExited | Joined | Lost]:
        """All that is heard, up to the first of a kind of message or event."""
        poller = zmq.Poller()
        for source in self.host.sources:
            poller.register(source, zmq.POLLIN)
        heard, self.later = self.later, []
        while True:
            kinds = [type(getattr(one, "message", one)) for one in heard]
            if kind in kinds:
                end = kinds.index(kind) + 1
                # What came with it is for the next call.
                self.later = heard[end:]
                return heard[:end]
            assert poller.poll(TIMEOUT_MS), f"only {heard}"
            exits = self.host.exits()
            # In the order of the supervisor: a process says nothing after its end.
            heard += [*self.events, *self.host.messages(), *exits]
            self.events.clear()

    def close(self) -> None:
        self.channel.close()
        self.agent.wait(180)
        self.context.destroy(linger=0)


KEYS = new_launch_keys()


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    with contextlib.closing(Launch(tmp_path_factory.mktemp("launch"))) as launch:
        launch.until(Joined)
        yield launch


def test_a_process_speaks_ends_and_its_log_comes_here(launch: Launch) -> None:
    launch.spawn(1, model="no-model")
    registered = launch.until(Register)[-1]
    assert isinstance(registered, MessageReceived)
    assert isinstance(registered.message, Register)
    assert registered.name == "prefill-0"
    heard = launch.until(ProcessExited)
    failed = [one for one in heard if isinstance(getattr(one, "message", None), Failed)]
    assert failed, "it says why it ends before it ends"
    assert ProcessExited("prefill-0", 1, 1) in heard
    assert "no-model" in launch.host.log_path("prefill-0").read_text()


def test_what_the_host_does_not_permit_fails_with_the_reason(launch: Launch) -> None:
    command = ("/bin/sh", "-c", "id")
    spec = ProcessSpec(name="decode-0", kind="server", unit="u", host="a", command=command)
    launch.spawn(1, spec)
    message, *_, gone = launch.until(ProcessExited)
    assert isinstance(message, MessageReceived)
    assert isinstance(message.message, Failed)
    assert "an agent does not start a server with /bin/sh" in message.message.error
    assert gone == ProcessExited("decode-0", 1, 126)


def test_an_agent_whose_socket_is_removed_joins_again(launch: Launch) -> None:
    launch.spawn(5)
    launch.until(Register)
    opened = psutil.Process(launch.agent.pid).net_connections("unix")
    (control,) = {Path(each.laddr) for each in opened if each.laddr.endswith("/control")}
    control.unlink()
    heard = [*launch.until(Joined), *launch.later]
    (lost,) = (one for one in heard if isinstance(one, Lost))
    assert lost.reason == f"{control.parent}, the folder of its agent, was removed"
    launch.spawn(6)
    launch.until(Register)
    launch.host.signal("prefill-0", signal.SIGKILL)
    assert launch.until(ProcessExited)[-1] == ProcessExited("prefill-0", 6, -signal.SIGKILL)
