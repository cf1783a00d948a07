"""Two or more hosts on this machine: namespaces of their own for net, uts, ipc, pid, mounts and
monotonic clocks, with a switch between them.

Nothing of a host is left once its first process has ended, and that one ends with the test's
process, however that dies: it reads a pipe whose other end the test holds.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil

from tests.netns.switch import DEVICE, MTU, Count, Knocks, Link, SetDoors, SetLink

TIMEOUT_S = 120.0
CURL_TIMED_OUT = 28
ROOT = Path(__file__).parents[2]
# Kernels before 5.6 have no clocks of a host's own.
_CLOCKS = ("--time",) if Path("/proc/self/ns/time").exists() else ()
_NAMESPACES = ("--net", "--uts", "--ipc", "--pid", "--mount", *_CLOCKS)
_DAY_S = 86_400
# Shared memory and temporary files are the host's own; /sys shows its network devices. The checkout
# is there on all hosts, be it in /tmp.
_FIRST_PROCESS = """
exec 3< "$1" && mount -t sysfs sysfs /sys && mount -t tmpfs -o mode=1777 tmpfs /dev/shm \
  && mount -t tmpfs -o mode=1777 tmpfs /tmp \
  && mkdir -p "$1" && mount -c --bind /proc/self/fd/3 "$1" \
  && hostname "$0" && ip link set lo up && echo ready
exec 3<&-
cat > /dev/null
"""


_LIST_LISTENERS = """
import contextlib, json, psutil
found = []
for process in psutil.process_iter():
    with contextlib.suppress(psutil.NoSuchProcess):
        words = process.cmdline()
        for each in process.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN:
                found.append((words, each.laddr.ip, each.laddr.port))
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Listening:
    process: str
    """The name of the process in its launch, else the words of its command."""
    address: str
    port: int


@dataclass(frozen=True)
class Knock:
    source: str
    target: str
    port: int
    is_let_in: bool


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    address6: str
    pid: int
    """Process id of its first process, as this machine sees it."""

    def file(self, path: str) -> Path:
        return Path(f"/proc/{self.pid}/root{path}")

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), *_NAMESPACES, "--wd=" + str(ROOT), *words]

    def run(self, *words: str, timeout_s: float = TIMEOUT_S) -> str:
        result = subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
        return result.stdout

    def get(self, url: str, *flags: str, timeout_s: float = 60) -> tuple[int, Any]:
        """Status and answer, JSON or text, of a request from the host; 0 where nobody answers, with
        the text ``stuck`` after so long.
        """
        words = ("curl", "--silent", "--max-time", str(timeout_s), *flags)
        command = self.command(*words, "--write-out", "\n%{http_code}", url)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == CURL_TIMED_OUT:
            return 0, "stuck"
        text, _, status = done.stdout.rpartition("\n")
        return int(status), json.loads(text) if text.startswith("{") else text

    @contextlib.contextmanager
    def running(self, *words: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Run a command, which is killed at the end if it has not ended."""
        with subprocess.Popen(self.command(*words), **options) as process:
            try:
                yield process
            finally:
                while process.poll() is None:  # it may not have begun
                    signal_inner(process)
                    time.sleep(0.01)

    def processes(self) -> list[psutil.Process]:
        """All living processes of the host except the first."""
        own = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                is_here = Path(f"/proc/{process.pid}/ns/pid").readlink() == own
                is_there = process.status() != psutil.STATUS_ZOMBIE
                if is_here and is_there and process.pid != self.pid and process.name() != "cat":
                    found.append(process)
        return found

    def find(self, *words: str) -> list[psutil.Process]:
        """The host's processes whose commands have all these words."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # It has ended.
                if {*words} <= {*process.cmdline()}:
                    found.append(process)
        return found

    def listening(self) -> set[Listening]:
        found = set()
        for words, address, port in json.loads(self.run(sys.executable, "-c", _LIST_LISTENERS)):
            is_named = "--name" in words
            name = words[words.index("--name") + 1] if is_named else " ".join(words[:6])
            found.add(Listening(name, address, port))
        return found

    def kill(self) -> None:
        os.kill(self.pid, 9)


@dataclass(frozen=True)
class Network:
    hosts: Sequence[Host]
    switch: subprocess.Popen[bytes]

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    def set_link(self, name: str, **link: Any) -> None:
        """Say how the cable of a host is from now on: see ``Link``."""
        port = self.hosts.index(self[name])
        self._ask(SetLink(port, Link(**link)))

    def set_doors(self, name: str, *doors: tuple[int, int]) -> None:
        """Have connections to these ports of a host alone pass from now on."""
        self._ask(SetDoors(self.hosts.index(self[name]), list(doors)))

    def knocks(self) -> list[Knock]:
        names = [host.name for host in self.hosts]
        return [
            Knock(names[source], names[target], port, is_open)
            for source, target, port, is_open in self._ask(Knocks())
        ]

    def num_bytes(self, source: str, target: str) -> int:
        ports = [self.hosts.index(self[name]) for name in (source, target)]
        return next((count for *pair, count in self._ask(Count()) if pair == ports), 0)

    def _ask(self, command: SetLink | SetDoors | Count | Knocks) -> Any:
        assert self.switch.stdin is not None
        assert self.switch.stdout is not None
        self.switch.stdin.write(msgspec.json.encode(command) + b"\n")
        self.switch.stdin.flush()
        return msgspec.json.decode(self.switch.stdout.readline())


def signal_inner(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    """Signal the process that ``Host.running`` has started: nsenter only waits for it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for inner in psutil.Process(process.pid).children():
            inner.send_signal(number)


@functools.cache
def why_not() -> str:
    """Why no hosts can be made here; empty when they can."""
    try:
        with new_network("probe"):
            return ""
    except (OSError, AssertionError) as error:
        return f"namespaces with a network of their own are not permitted here: {error}"


@contextlib.contextmanager
def new_network(*names: str) -> Iterator[Network]:
    with contextlib.ExitStack() as stack:
        hosts = [
            Host(
                name, f"10.77.0.{index}", f"fd77::{index}", stack.enter_context(_first(name, index))
            )
            for index, name in enumerate(names, 1)
        ]
        switch = stack.enter_context(
            _child([sys.executable, "-m", "tests.netns.switch", *(str(h.pid) for h in hosts)])
        )
        _await_line(switch, b"ready")
        for host in hosts:
            for words in (
                ("addr", "add", f"{host.address}/24", "dev", DEVICE),
                ("addr", "add", f"{host.address6}/64", "dev", DEVICE, "nodad"),
                ("link", "set", DEVICE, "mtu", str(MTU), "up"),
                ("route", "add", "default", "dev", DEVICE),
            ):
                host.run("ip", *words)
        yield Network(hosts, switch)


@contextlib.contextmanager
def _first(name: str, days: int) -> Iterator[int]:
    """The first process of a host that has run for so many days longer than this one; its id."""
    words = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
    if _CLOCKS:
        words += [f"--{clock}={days * _DAY_S}" for clock in ("monotonic", "boottime")]
    with _child([*words, "sh", "-c", _FIRST_PROCESS, name, str(ROOT)]) as unshare:
        _await_line(unshare, b"ready")
        yield psutil.Process(unshare.pid).children()[0].pid


@contextlib.contextmanager
def _child(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends at the end of its standard input."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
    ) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(TIMEOUT_S)


def _await_line(process: subprocess.Popen[bytes], wanted: bytes) -> None:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line == wanted, (line + b" " + _rest(process.stdout)).decode(errors="replace")


def _rest(pipe: IO[bytes]) -> bytes:
    os.set_blocking(pipe.fileno(), False)
    time.sleep(0.1)
    return pipe.read() or b""
