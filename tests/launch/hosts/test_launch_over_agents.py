"""A whole launch over two agents, whose engines are stand-ins: what becomes of a lost host's."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from pdlaunch.config.models import LaunchConfig
from pdlaunch.launch import launch as launch_module
from pdlaunch.launch.engines import native, plan
from pdlaunch.launch.hosts import agent as agent_module
from pdlaunch.launch.hosts.agent_channel import AgentChannel, Joined
from pdlaunch.launch.hosts.agent_messages import Join
from pdlaunch.launch.hosts.join import joined_host, new_join_keys
from pdlaunch.launch.launch import LaunchOutcome, launch
from pdlaunch.launch.ports import listening
from pdlaunch.launch.status import LaunchStatus, ProcessState
from pdlaunch.machine.facts import Machine
from pdlaunch.machine.machine_file import encode_machine
from pdlaunch.planning.hosts import ResolvedHost, planned_hosts
from pdlaunch.planning.resolve import resolve_on
from tests.launch.fakes import FakeObserver
from tests.launch.hosts.test_agent_channel import Agent, next_event
from tests.launch.real import FAKE_CHILD
from tests.planning.test_resolve import write_model

pytestmark = pytest.mark.processes


def join_of(name: str, num_cores: int) -> Join:
    machine = Machine(num_cpus=num_cores, memory_bytes=64 << 30)
    return Join(
        name=name, address="127.0.0.1", machine=encode_machine(machine, {}), python=sys.executable
    )


class Watcher(FakeObserver):
    """Does something when the launch is ready, and ends it once ``is_done``."""

    def __init__(
        self, when_ready: Callable[[], None], is_done: Callable[[dict[str, str]], bool]
    ) -> None:
        super().__init__()
        self._when_ready = when_ready
        self._is_done = is_done
        self._is_ending = False

    def ready(self, status: LaunchStatus) -> None:
        self._when_ready()

    def changed(self, status: LaunchStatus) -> None:
        super().changed(status)
        places = {
            process.name: f"{process.host}/{process.incarnation}"
            for process in status.processes
            if process.state is ProcessState.READY
        }
        if self._is_done(places) and not self._is_ending:
            self._is_ending = True
            signal.raise_signal(signal.SIGINT)


class Stage:
    """Hosts a and b, whose agents are threads of this process."""

    def __init__(self, folder: Path, num_cores: int) -> None:
        self.folder = folder
        self.num_cores = num_cores
        self.config = LaunchConfig.model_validate(
            {
                "model": str(write_model(folder / "tiny", dtype="float32")),
                "port": 0,
                "placement": "hosts",
                "placement_strategy": "spread",
                "hosts": "a,b",
                "control_address": "127.0.0.1",
                "hang_timeout_s": 0,
                "drain_timeout_s": 0,
                "kv_transfer": {"trusted_network": True},
            }
        )
        self.keys = new_join_keys()
        self.channel = AgentChannel(
            self.keys, "127.0.0.1", ["a", "b"], timeout_s=60.0, print_to=self.log
        )
        self.agents = {name: self.agent(name) for name in ("a", "b")}

    def log(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '.')}.log"

    def agent(self, name: str) -> Agent:
        ticket = self.keys.ticket(self.channel.endpoint)
        return Agent(ticket, join_of(name, self.num_cores))

    def launch(self, observer: Watcher) -> LaunchOutcome:
        joined: dict[str, ResolvedHost] = {}
        while joined.keys() != {"a", "b"}:
            event = next_event(self.channel)
            assert isinstance(event, Joined)
            joined[event.join.name] = joined_host(event.join)
        hosts = planned_hosts(self.config, Machine(), {}, joined)
        resolved = resolve_on(self.config, hosts, {})
        with listening("127.0.0.1", 0) as listeners:
            return launch(
                resolved,
                observer,
                listeners,
                launch_id="l",
                log_dir=self.folder,
                agents=self.channel,
                joined=tuple(joined),
            )

    def close(self) -> None:
        self.channel.close()
        for agent in self.agents.values():
            agent.end()


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Stage]]:
    def stand_in(room: str, *words: str) -> tuple[str, ...]:
        return (sys.executable, str(FAKE_CHILD), room)

    # It would keep a file open that this process needs no more.
    monkeypatch.setattr(launch_module, "setup_logging", lambda *_, **__: None)
    for module in (native, plan):
        monkeypatch.setattr(module, "python_command", stand_in)
    monkeypatch.setattr(agent_module, "permitted", lambda spec, executables: spec)
    with contextlib.ExitStack() as stack:
        yield lambda num_cores: stack.enter_context(contextlib.closing(Stage(tmp_path, num_cores)))


ENGINE = ("decode-0", "decode-0/rank-0")


def test_engines_of_a_lost_host_go_on_where_there_is_room(stage: Callable[[int], Stage]) -> None:
    there = stage(4)
    observer = Watcher(
        lambda: there.agents.pop("b").stop(),
        lambda places: {places.get(name) for name in ENGINE} == {"a/2"},
    )
    outcome = there.launch(observer)
    assert outcome.exit_code == 0, outcome.report
    assert "b is lost: its agent was told to end" in observer.notes
    assert any(
        note.startswith("decode-0/rank-0 on b was lost with its host b") for note in observer.notes
    )
    prefill = {
        process.host for process in observer.statuses[-1].processes if "prefill" in process.name
    }
    assert prefill == {"a"}
    assert there.log("prefill-0").read_text() == "stopped\n", "what is printed there comes here"


def test_without_room_they_wait_until_it_is_back(stage: Callable[[int], Stage]) -> None:
    there = stage(1)

    def lose() -> None:
        there.agents.pop("b").stop()
        there.agents["b"] = there.agent("b")

    observer = Watcher(lose, lambda places: {places.get(name) for name in ENGINE} == {"b/2"})
    assert there.launch(observer).exit_code == 0
    assert "b has joined again, from 127.0.0.1" in observer.notes
    assert there.agents["b"].notes == ["joined as b"]


def test_it_names_the_host_of_what_fails_at_the_start(
    stage: Callable[[int], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = stage(4)
    permitted = agent_module.permitted

    def failing(spec: plan.ProcessSpec, executables: dict[str, str]) -> plan.ProcessSpec:
        if spec.name != "decode-0":
            return permitted(spec, executables)
        return msgspec.structs.replace(spec, command=(*spec.command, "fail"))

    monkeypatch.setattr(agent_module, "permitted", failing)
    outcome = there.launch(Watcher(lambda: None, lambda places: False))
    assert outcome.exit_code == 1
    assert outcome.report[0].startswith("decode-0 on b ")
    assert any("cannot open model.safetensors" in line for line in outcome.report)
