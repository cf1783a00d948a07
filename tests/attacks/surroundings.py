"""Launches in bad surroundings: each starts and serves, or ends soon with a reason in words; and
nothing stays behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
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

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.api import Api
from pdlaunch.launch.client.deployment import held_port
from tests.attacks.target import SERVED
from tests.attacks.verdict import Verdict
from tests.e2e.conftest import clean_environ
from tests.e2e.faults import lives

START_LIMIT_S = 90.0
STOP_LIMIT_S = 40.0
NUM_IDLE = 700
NUM_DESCRIPTORS = 512
MOST_LOG_BYTES = 5 * 2**20


@dataclass(frozen=True)
class Surroundings:
    """How the command is started, and what it may do about it."""

    what: str
    prefix: Sequence[str] = ()
    environ: dict[str, str] = field(default_factory=dict)
    needs_root: bool = False
    must_start: bool = False


def limited(option: str, value: int) -> tuple[str, ...]:
    return ("bash", "-c", f'ulimit {option} {value}; exec "$@"', "limited")


def mounted(*mounts: str) -> tuple[str, ...]:
    return ("unshare", "-m", "bash", "-c", " && ".join(mounts) + ' && exec "$@"', "mounted")


ALL = (
    Surroundings("64 descriptors", limited("-n", 64)),
    Surroundings("256 descriptors", limited("-n", 256), must_start=True),
    Surroundings("4 GiB of addresses", limited("-v", 4 * 2**20)),
    Surroundings("no home", environ={"HOME": "/nonexistent"}, must_start=True),
    Surroundings("/proc for a home", environ={"HOME": "/proc"}),
    Surroundings(
        "no folder for temporary files", environ={"TMPDIR": "/nonexistent"}, must_start=True
    ),
    Surroundings(
        "/dev/shm of 1 MiB", mounted("mount -t tmpfs -o size=1m tmpfs /dev/shm"), needs_root=True
    ),
    Surroundings(
        "/dev/shm is read-only",
        mounted("mount -t tmpfs -o size=1m,ro tmpfs /dev/shm"),
        needs_root=True,
    ),
)


def surroundings(model: Path, verdict: Verdict) -> None:
    """Each in turn, then a full log disk, and few descriptors under many connections."""
    for one in ALL:
        if one.needs_root and os.getuid() != 0:
            verdict.row(one.what, "skipped: needs root")
            continue
        with launched(verdict, one, model) as launch:
            judge_start(verdict, one, launch)
    full_log_disk(verdict, model)
    many_connections(verdict, model)


@dataclass
class Launch:
    """A launch that may never become ready."""

    process: subprocess.Popen[bytes]
    api: Api
    output: Path
    logs: Path

    def await_ready(self) -> bool:
        deadline_s = time.monotonic() + START_LIMIT_S
        while self.process.poll() is None and time.monotonic() < deadline_s:
            with contextlib.suppress(PdlaunchError):
                if self.api.get("/health")[0] == 200:
                    return True
            time.sleep(0.1)
        return False

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@contextlib.contextmanager
def launched(
    verdict: Verdict,
    one: Surroundings,
    model: Path,
    logs: Path | None = None,
) -> Iterator[Launch]:
    """Start it; at the end stop it, and look for processes that it leaves behind."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        port = stack.enter_context(held_port())
        output, log_dir = Path(folder) / "output", logs or Path(folder) / "logs"
        serve = [sys.executable, "-P", "-m", "pdlaunch", "serve", "--model", str(model), *SERVED]
        command = [*one.prefix, *serve, "--port", str(port), "--log-dir", str(log_dir)]
        environ = clean_environ() | {"PDLAUNCH_CACHE": str(Path(folder) / "cache")} | one.environ
        with output.open("wb") as sink:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
            )
        launch = Launch(process, Api(f"http://127.0.0.1:{port}", timeout_s=10), output, log_dir)
        children: list[psutil.Process] = []
        try:
            yield launch
        finally:
            children = launch.children()
            start_s = time.monotonic()
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                verdict.broke(f"a launch stops within {STOP_LIMIT_S:g} s", one.what)
                process.kill()
                process.wait()
            judge_end(verdict, one.what, children, start_s + STOP_LIMIT_S)


def judge_start(verdict: Verdict, one: Surroundings, launch: Launch) -> None:
    start_s = time.monotonic()
    if launch.await_ready():
        statuses = [complete(launch.api) for _ in range(5)]
        seconds = time.monotonic() - start_s
        verdict.row(one.what, f"served after {seconds:.1f} s", f"statuses {statuses}")
        if set(statuses) != {200}:
            verdict.broke("what has started serves", f"{one.what}: {statuses}")
    else:
        seconds = time.monotonic() - start_s
        said = launch.said()
        reason = next(
            (line.strip() for line in reversed(said.splitlines()) if line.strip()), "nothing"
        )
        verdict.row(
            one.what, f"ended with {launch.process.poll()} after {seconds:.1f} s", reason[:100]
        )
        if launch.process.poll() is None:
            verdict.broke(f"a launch starts or ends within {START_LIMIT_S:g} s", one.what)
        if one.must_start:
            verdict.broke("it starts in such surroundings", f"{one.what}: {said[-400:]}")
    if "Traceback" in launch.said():
        verdict.broke("what goes wrong is told in words", f"{one.what}: {launch.said()[-600:]}")


def judge_end(
    verdict: Verdict, what: str, children: Sequence[psutil.Process], deadline_s: float
) -> None:
    """No process outlives its launch."""
    while (left := [child for child in children if lives(child)]) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    for child in left:
        verdict.broke("no process outlives its launch", f"{what}: {child}")
        child.kill()


def full_log_disk(verdict: Verdict, model: Path) -> None:
    """Logs are the least that may fail: answers come all the same, and dead ranks are replaced."""
    what = "a log disk of 8 KiB"
    if os.getuid() != 0 or shutil.which("mount") is None:
        verdict.row(what, "skipped: needs root")
        return
    with tempfile.TemporaryDirectory() as disk:
        if (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], check=False
            ).returncode
            != 0
        ):
            verdict.row(what, "skipped: nothing can be mounted")
            return
        try:
            one = Surroundings(what, environ={"PDLAUNCH_LOG_LEVEL": "debug"}, must_start=True)
            with launched(verdict, one, model, logs=Path(disk) / "logs") as launch:
                judge_start(verdict, one, launch)
                for child in launch.children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if "decode-0/rank-0" in child.cmdline():
                            child.kill()
                deadline_s = time.monotonic() + START_LIMIT_S
                while complete(launch.api) != 200 and time.monotonic() < deadline_s:
                    time.sleep(0.2)
                if (status := complete(launch.api)) != 200:
                    verdict.broke(
                        "a full log disk stops no answer",
                        f"{what}: {status} after a rank was killed",
                    )
        finally:
            subprocess.run(["umount", "--lazy", disk], check=False)


def many_connections(verdict: Verdict, model: Path) -> None:
    """More connections than descriptors: others are served, and the log stays short."""
    what = f"{NUM_IDLE} idle connections, {NUM_DESCRIPTORS} descriptors"
    one = Surroundings(what, limited("-n", NUM_DESCRIPTORS), must_start=True)
    with launched(verdict, one, model) as launch, contextlib.ExitStack() as stack:
        judge_start(verdict, one, launch)
        port = int(launch.api.url.rpartition(":")[2])
        for _ in range(NUM_IDLE):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=2))
        start_s = time.monotonic()
        statuses: list[int] = []
        while time.monotonic() < start_s + 45 and statuses[-3:] != [200] * 3:
            statuses.append(complete(launch.api))
            time.sleep(1)
        size = sum(file.stat().st_size for file in launch.logs.rglob("*") if file.is_file())
        verdict.row(
            what,
            f"served again after {time.monotonic() - start_s:.0f} s",
            f"logs {size / 2**20:.1f} MiB",
        )
        if statuses[-3:] != [200] * 3:
            verdict.broke("idle connections stop nobody for more than 30 s", f"{what}: {statuses}")
        if size > MOST_LOG_BYTES:
            verdict.broke(
                "failures to accept are logged once a minute", f"{what}: {size} bytes of logs"
            )


def complete(api: Api) -> int:
    """Status of a small request; 0: no answer."""
    try:
        return api.post("/v1/completions", {"prompt": "a", "max_tokens": 3})[0]
    except (PdlaunchError, ValueError):
        return 0
