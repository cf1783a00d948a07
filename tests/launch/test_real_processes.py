"""Real processes are spawned, signalled and buried; nothing is left behind.

There may be one core, so launches are few and small.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pdlaunch.launch.state import Timing
from pdlaunch.launch.status import LaunchStatus, ProcessState
from tests.e2e.waiting import await_true
from tests.launch.fakes import FakeObserver
from tests.launch.real import real_plan, run_plan

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
IMPATIENT = Timing(startup_timeout_s=60, drain_s=0.2, stop_s=0.2, terminate_s=0.2)


class InterruptWhenReady(FakeObserver):
    """Presses Ctrl-C as soon as the launch serves."""

    def ready(self, status: LaunchStatus) -> None:
        super().ready(status)
        self.pids = {process.name: process.pid for process in status.processes}
        self.info = {process.name: process.info for process in status.processes}
        os.kill(os.getpid(), signal.SIGINT)


class KillOnce(FakeObserver):
    """Kills one process when the launch serves, and presses Ctrl-C when all is well again."""

    def __init__(self, name: str, *, kills: bool = True) -> None:
        """``kills=False``: it dies by itself."""
        super().__init__()
        self.name = name
        self.kills = kills
        self.before: dict[str, int | None] = {}
        self.after: dict[str, int | None] = {}

    def ready(self, status: LaunchStatus) -> None:
        self.before = {process.name: process.pid for process in status.processes}
        pid = self.before[self.name]
        assert pid is not None
        if self.kills:
            os.kill(pid, signal.SIGKILL)

    def changed(self, status: LaunchStatus) -> None:
        if not self.before or self.after:
            return
        restarted = any(
            process.name == self.name and process.incarnation == 2 for process in status.processes
        )
        well = (
            all(process.state is ProcessState.READY for process in status.processes)
            and not status.num_missing_pairs
        )
        if restarted and well:
            self.after = {process.name: process.pid for process in status.processes}
            os.kill(os.getpid(), signal.SIGINT)


def assert_gone(*pids: int | None) -> None:
    await_true(lambda: not any(lives(pid) for pid in pids if pid is not None), "all are gone")


def lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_start_serve_drain_stop(tmp_path: Path) -> None:
    observer = InterruptWhenReady()
    outcome = run_plan(real_plan({"router": "grandchild"}), observer, tmp_path, Timing())
    assert outcome.exit_code == 0
    assert outcome.was_ready
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "decode-0.log",
        "decode-0.rank-0.log",
        "prefill-0.log",
        "prefill-0.rank-0.log",
        "router.log",
    ]
    assert (tmp_path / "router.log").read_text() == "drained\nstopped\n"
    assert (tmp_path / "decode-0.log").read_text() == "drained\nstopped\n"
    assert (tmp_path / "decode-0.rank-0.log").read_text() == "stopped\n"
    assert_gone(*observer.pids.values(), int(observer.info["router"]["grandchild"]))


def test_a_crash_at_start_is_reported_with_its_log_and_all_are_stopped(tmp_path: Path) -> None:
    outcome = run_plan(real_plan({"prefill-0/rank-0": "crash"}), FakeObserver(), tmp_path, Timing())
    assert outcome.exit_code == 1
    assert len(outcome.report) <= 20
    assert outcome.report[0] == "prefill-0/rank-0 ended with exit code 1 before it was ready"
    assert outcome.report[-2:] == (
        "  RuntimeError: the weights are not there",
        f"log: {tmp_path}/prefill-0.rank-0.log",
    )


def test_a_child_that_ignores_stop_and_term_is_killed(tmp_path: Path) -> None:
    observer = InterruptWhenReady()
    outcome = run_plan(
        real_plan({"decode-0": "ignore-term deaf"}, num_prefill=0), observer, tmp_path, IMPATIENT
    )
    assert outcome.exit_code == 0
    assert_gone(*observer.pids.values())


def test_the_router_hears_of_the_last_step_of_a_rank_that_crashed(tmp_path: Path) -> None:
    observer = KillOnce("decode-0/rank-0", kills=False)
    timing = Timing(first_delay_s=0.01)
    outcome = run_plan(
        real_plan({"decode-0/rank-0": "crash-in-a-step"}, num_prefill=0), observer, tmp_path, timing
    )
    assert outcome.exit_code == 0
    assert (tmp_path / "router.log").read_text().count("suspects [5, 7] repeated [5]\n") == 1


@pytest.fixture
def launches(tmp_path: Path):
    started: list[subprocess.Popen[str]] = []

    def start(name: str) -> tuple[subprocess.Popen[str], list[int]]:
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, "-m", "tests.launch.fake_launch", str(folder)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_launches_at_once_and_no_child_outlives_a_killed_supervisor(launches) -> None:
    first, first_pids = launches("first")
    second, second_pids = launches("second")
    first.kill()
    first.wait()
    assert_gone(*first_pids)
    assert all(psutil.pid_exists(pid) for pid in second_pids)
    second.send_signal(signal.SIGTERM)
    assert second.wait(timeout=180) == 0
    assert_gone(*second_pids)


def test_a_guarded_module_ends_with_the_pipe_that_the_supervisor_holds() -> None:
    unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-m",
        "pdlaunch.protocol.process.guarded",
        "http.server",
        "0",
        "--bind",
        "127.0.0.1",
    ]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=unbuffered,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert b"Serving HTTP" in process.stdout.readline()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=180) == -signal.SIGKILL
