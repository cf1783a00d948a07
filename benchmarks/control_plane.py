"""Measures the control plane with simulated engines: ``python -m benchmarks.control_plane``.

Supervisor, control channel and router are the real ones. Another process (``simulated_engines``)
simulates all engines: it registers them, sends their heartbeats, claims that their pairs are
proven, and answers HTTP.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import zmq

from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import PAIR, Role
from pdlaunch.launch.bootstraps import HEARTBEATS, Bootstraps, router_spec
from pdlaunch.launch.engines import light_environment, python_command, with_peers
from pdlaunch.launch.events import Event, EventQueue, SignalInbox, StopRequested
from pdlaunch.launch.hosts.local import LocalHost, MessageReceived, ProcessExited
from pdlaunch.launch.state import Timing
from pdlaunch.launch.status import LaunchStatus
from pdlaunch.launch.supervisor import Supervisor, drive
from pdlaunch.planning.plan import Plan, ProcessSpec
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.protocol.control import FromSupervisor, Stop, from_supervisor
from pdlaunch.protocol.process.bootstrap import Bootstrap, raise_open_files
from pdlaunch.protocol.process.engine_ports import EnginePorts
from pdlaunch.protocol.sockets import LaunchKeys, SecureContext, new_launch_keys
from tests.launch.fakes import FakePlaces

HANG_TIMEOUT_S = 60.0
SETTLE_S = 3.0
"""Time between two phases, in which the effects of the first one end."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Messages, bytes and CPU seconds up to an instant, or between two instants (``since``)."""

    at: float = 0.0
    received: int = 0
    sent: int = 0
    sent_bytes: int = 0
    supervisor_s: float = 0.0
    router_s: float = 0.0

    def since(self, before: Cost) -> Cost:
        names = self.__slots__
        return Cost(*(getattr(self, name) - getattr(before, name) for name in names))


@dataclass
class Counted:
    """Counts of messages on the control channel."""

    received: int = 0
    sent: int = 0
    sent_bytes: int = 0


class SimulatedHost(LocalHost):
    """Starts the router on this machine; ``simulator`` simulates all other processes."""

    def __init__(
        self, control: zmq.Socket[bytes], run_dir: Path, simulator: subprocess.Popen[bytes]
    ) -> None:
        super().__init__(control, run_dir, EnginePorts())
        self.counted = Counted()
        self._simulator = simulator
        self._control_socket = control
        self._running: dict[str, int] = {}
        self._gone: list[ProcessExited] = []
        self._has_gone = os.eventfd(0, os.EFD_NONBLOCK)

    @property
    def sources(self) -> Sequence[zmq.Socket[bytes] | int]:
        return (*super().sources, self._has_gone)

    def spawn(
        self, spec: ProcessSpec, incarnation: int, bootstrap: Bootstrap
    ) -> ProcessExited | None:
        if spec.kind == "router":
            return super().spawn(spec, incarnation, bootstrap)
        self._running[spec.name] = incarnation
        self._tell({"start": spec.name, "incarnation": incarnation, "role": spec.role})
        return None

    def signal(self, name: str, signal_number: int) -> None:
        if name not in self._running:
            super().signal(name, signal_number)
            return
        self._tell({"stop": name})
        self._gone.append(ProcessExited(name, self._running.pop(name), -signal_number))
        os.eventfd_write(self._has_gone, 1)

    def send(self, name: str, message: FromSupervisor) -> None:
        data = from_supervisor.encode(message)
        self.counted.sent += 1
        self.counted.sent_bytes += len(data)
        self._control_socket.send_multipart([name.encode(), data])
        if isinstance(message, Stop) and name in self._running:
            self.signal(name, signal.SIGTERM)

    def exits(self) -> list[ProcessExited]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._has_gone)
        gone, self._gone = self._gone, []
        return [*gone, *super().exits()]

    def messages(self) -> list[MessageReceived]:
        found = super().messages()
        self.counted.received += len(found)
        return found

    def _tell(self, what: object) -> None:
        assert self._simulator.stdin is not None
        self._simulator.stdin.write(json.dumps(what).encode() + b"\n")
        self._simulator.stdin.flush()


class _Bootstraps(Bootstraps):
    """Makes the bootstrap of the router; simulated processes do not read theirs."""

    def __init__(
        self, keys: LaunchKeys, control: str, run_dir: Path, listener: socket.socket
    ) -> None:
        config = LaunchConfig(hang_timeout_s=HANG_TIMEOUT_S)
        self._router = router_spec(config, "simulated", [listener])
        self._keys, self._control, self._run_dir = keys, control, run_dir
        self.listeners = [listener]

    def make(self, spec: ProcessSpec, incarnation: int, launch: ResolvedLaunch) -> Bootstrap:
        return Bootstrap(
            name=spec.name,
            incarnation=incarnation,
            control=self._control,
            keys=self._keys,
            run_dir=str(self._run_dir),
            log_level="warning",
            router=self._router if spec.kind == "router" else None,
            heartbeat_s=HANG_TIMEOUT_S / HEARTBEATS,
        )


@dataclass
class Script:
    """Provides the supervisor's events, and runs the phases: start, rest, scrape, restart.

    It is also the launch's observer: ``ready`` begins the phases.
    """

    host: SimulatedHost
    queue: EventQueue
    port: int
    rest_s: float
    costs: dict[str, Cost] = field(default_factory=dict)
    _waits_until: float = 0.0
    _phases: Iterator[float] | None = None
    _injected: list[Event] = field(default_factory=list)
    status: LaunchStatus | None = None

    def changed(self, status: LaunchStatus) -> None:
        self.status = status

    def ready(self, status: LaunchStatus) -> None:
        self._phases = self._run()

    def note(self, text: str) -> None:
        """Do nothing."""

    def wait(self, timeout_s: float) -> Sequence[Event]:
        now = time.monotonic()
        if self._phases is not None and now >= self._waits_until:
            self._waits_until = now + next(self._phases, 3600.0)
        left_s = max(0.0, self._waits_until - now) if self._phases else timeout_s
        events = self.queue.wait(min(timeout_s, left_s))
        injected, self._injected = self._injected, []
        return [*events, *injected]

    def cost(self) -> Cost:
        router = next(
            (each for each in psutil.Process().children() if "pdlaunch.router" in each.cmdline()),
            None,
        )
        counted = self.host.counted
        return Cost(
            time.monotonic(),
            counted.received,
            counted.sent,
            counted.sent_bytes,
            time.process_time(),
            0.0 if router is None else sum(router.cpu_times()[:2]),
        )

    def _run(self) -> Iterator[float]:
        """Run the phases. Yield how long to wait until the next step, in seconds."""
        self.costs["start"] = self.cost().since(self.costs["begin"])
        yield SETTLE_S
        for phase in ("rest", "scrape", "restart"):
            mark = self.cost()
            if phase == "scrape":
                scraper = _scrape(self.port)
                while scraper.poll() is None:
                    yield 0.1
            elif phase == "restart":
                self.host.signal("decode-0/rank-0", signal.SIGKILL)
                yield SETTLE_S
            else:
                yield self.rest_s
            self.costs[phase] = self.cost().since(mark)
        self._injected.append(StopRequested(signal.SIGTERM, "measured"))
        self._injected.append(StopRequested(signal.SIGTERM, "measured"))


def _scrape(port: int) -> subprocess.Popen[bytes]:
    """Start a process that reads the router's /metrics, which include those of all engines."""
    code = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{port}/metrics').read()"
    return subprocess.Popen([sys.executable, "-c", code])


def make_plan(num_engines: int) -> Plan:
    """Plan one half of the engines for prefill, the other for decode, each with one rank."""
    specs: list[ProcessSpec] = []
    for role in PAIR:
        for index in range(num_engines // 2):
            specs += _engine(role, f"{role}-{index}")
    router = ProcessSpec(
        name="router",
        kind="router",
        unit="router",
        command=python_command("pdlaunch.router", "--name", "router"),
        environment=light_environment(),
    )
    return Plan(processes=(*with_peers(specs), router))


def _engine(role: Role, name: str) -> tuple[ProcessSpec, ProcessSpec]:
    rank = ProcessSpec(
        name=f"{name}/rank-0", kind="rank", unit=f"{name}/ranks", engine=name, role=role
    )
    return rank, ProcessSpec(name=name, kind="server", unit=name, engine=name, role=role)


def measure(num_engines: int, rest_s: float) -> tuple[dict[str, Cost], int]:
    """Run a launch of simulated engines; return phase -> cost, and the number of proven pairs."""
    plan = make_plan(num_engines)
    keys = new_launch_keys()
    with contextlib.ExitStack() as stack:
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdlaunch-scale-")))
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        context = stack.enter_context(contextlib.closing(SecureContext(keys)))
        control, endpoint = context.listen(zmq.ROUTER, f"ipc://{run_dir}/control")
        first = {
            "keys": [keys.public, keys.secret, keys.http_token],
            "control": endpoint,
            "heartbeat_s": HANG_TIMEOUT_S / HEARTBEATS,
        }
        simulator = stack.enter_context(
            subprocess.Popen(python_command("benchmarks.simulated_engines"), stdin=subprocess.PIPE)
        )
        assert simulator.stdin is not None
        simulator.stdin.write(json.dumps(first).encode() + b"\n")
        signals = stack.enter_context(SignalInbox())
        host = SimulatedHost(control, run_dir, simulator)
        stack.callback(host.close)
        script = Script(host, EventQueue(host, signals), listener.getsockname()[1], rest_s)
        script.costs["begin"] = script.cost()
        supervisor = Supervisor(
            plan,
            host,
            _Bootstraps(keys, endpoint, run_dir, listener),
            FakePlaces(),
            script,
            Timing(drain_s=0.0, hang_timeout_s=HANG_TIMEOUT_S),
            time.monotonic,
        )
        drive(supervisor, script.wait, time.monotonic)
        if (failure := supervisor.seen.failure) is not None:
            raise RuntimeError("\n".join(failure.report(run_dir / "router.log")))
        num_pairs = 0 if script.status is None else len(script.status.pairs)
        simulator.stdin.close()
        return script.costs, num_pairs


def main() -> None:
    """Print a Markdown table with a row for each number of engines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", default="10,100,1000", help="numbers of engines")
    parser.add_argument("--seconds", type=float, default=20.0, help="time at rest")
    options = parser.parse_args()
    raise_open_files()
    heads = (
        "engines",
        "pairs",
        "start: s",
        "messages in",
        "out",
        "MB out",
        "CPU s supervisor",
        "router",
        "at rest: messages/s",
        "CPU % supervisor",
        "router",
        "scrape: CPU ms router",
        "restart of one: messages out",
        "kB out",
        "CPU ms supervisor",
        "router",
    )
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)  # noqa: T201
    for text in options.engines.split(","):
        costs, num_pairs = measure(int(text), options.seconds)
        start, rest, scrape, restart = (
            costs[name] for name in ("start", "rest", "scrape", "restart")
        )
        cells = (
            text,
            num_pairs,
            f"{start.at:.1f}",
            start.received,
            start.sent,
            f"{start.sent_bytes / 1e6:.2f}",
            f"{start.supervisor_s:.2f}",
            f"{start.router_s:.2f}",
            f"{(rest.received + rest.sent) / rest.at:.1f}",
            f"{100 * rest.supervisor_s / rest.at:.2f}",
            f"{100 * rest.router_s / rest.at:.2f}",
            f"{1000 * scrape.router_s:.0f}",
            restart.sent,
            f"{restart.sent_bytes / 1e3:.0f}",
            f"{1000 * restart.supervisor_s:.0f}",
            f"{1000 * restart.router_s:.0f}",
        )
        print(f"| {' | '.join(map(str, cells))} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
