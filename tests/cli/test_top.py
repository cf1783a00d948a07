"""``pdlaunch top`` on a real pseudo-terminal, whose screen pyte keeps as a terminal would."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyte
import pytest

from pdlaunch.cli.top_view import Screen, Snapshot, lay_out
from tests.cli.deployment_server import (
    HOSTILE,
    DeploymentServer,
    deployment,
    engine,
    request,
    running_server,
    trace,
)

ROOT = Path(__file__).parents[2]
ENTER_SCREEN, LEAVE_SCREEN, SHOW_CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"


class Terminal:
    """Runs ``pdlaunch top`` on a terminal of a size; ``screen`` is what a person sees."""

    def __init__(
        self,
        *arguments: str,
        columns: int = 80,
        rows: int = 24,
        program: tuple[str, ...] = ("-m", "pdlaunch"),
        **environ: str,
    ) -> None:
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.written = b""
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._theirs = theirs
        self.before = termios.tcgetattr(theirs)
        known = {name: value for name, value in os.environ.items() if not name.startswith("PDL")}
        self.process = subprocess.Popen(
            [sys.executable, "-P", *program, "top", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # Ctrl-C is typed: the terminal makes a signal of it.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=known | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)} | environ,
        )

    def until(self, condition: Callable[[str], object]) -> str:
        """Read until the screen is as wanted; returns its text."""
        until_at = time.monotonic() + 60
        while not condition("\n".join(self.screen.display)):
            assert time.monotonic() < until_at, "\n".join(self.screen.display)
            self.read(0.2)
        return "\n".join(self.screen.display)

    def read(self, timeout_s: float) -> None:
        if select.select([self._ours], [], [], timeout_s)[0]:
            written = os.read(self._ours, 65536)
            self.written += written
            self._stream.feed(written)

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def end(self) -> int:
        """Wait for the end, and return the exit code."""
        while self.process.poll() is None:
            self.read(0.1)
        while select.select([self._ours], [], [], 0.2)[0]:
            self.read(0.0)
        return self.process.returncode

    def is_restored(self) -> bool:
        left = self.written.rfind(LEAVE_SCREEN) > self.written.rfind(ENTER_SCREEN)
        shown = self.written.rfind(SHOW_CURSOR) > self.written.rfind(b"\x1b[?25l")
        return left and shown and termios.tcgetattr(self._theirs) == self.before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


@pytest.fixture(scope="module")
def router() -> Iterator[DeploymentServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def terminal(router: DeploymentServer) -> Iterator[Terminal]:
    terminal = Terminal(router.url, "--every", "0.2", NO_COLOR="1")
    yield terminal
    terminal.close()


@pytest.mark.processes
def test_it_shows_the_deployment_sorts_pauses_and_opens_a_trace(
    router: DeploymentServer, terminal: Terminal
) -> None:
    text = terminal.until(lambda text: "decode-0" in text and "the-slow-one" in text)
    for told in ("requests/s", "30%/10%/20%", "prefill-0 -> decode-0", "p2p/posix_fd", "DOWN|gone"):
        assert any(part in text for part in told.split("|")), text
    assert "▇" in text or "█" in text
    rows = [line.split()[0] for line in text.splitlines() if line.startswith("  decode-0 ")]
    assert rows == ["decode-0"]
    terminal.press("ss")
    terminal.until(lambda text: "engines by KV" in text)
    terminal.press("p")
    terminal.until(lambda text: "PAUSED" in text)
    router.status = deployment(model="another")
    terminal.press("\x1b[B")
    text = terminal.until(lambda text: "> another" in text)
    assert text.startswith("tiny"), "it is paused"
    terminal.press("p")
    terminal.until(lambda text: text.startswith("another "))
    terminal.press("\r")
    text = terminal.until(lambda text: "q back" in text)
    assert text.startswith("another  ")
    lanes = {line.split()[0]: line for line in text.splitlines() if "█" in line}
    assert lanes.keys() >= {"request", "prefill", "pull"}
    assert lanes["prefill"].index("█") < lanes["pull"].index("█")
    terminal.press("q")
    terminal.until(lambda text: "slowest running" in text)
    terminal.press("q")
    assert terminal.end() == 0
    assert terminal.is_restored()
    router.status = deployment()


@pytest.mark.processes
@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM", "SIGHUP"])
def test_the_terminal_is_given_back(terminal: Terminal, end: str) -> None:
    terminal.until(lambda text: "decode-0" in text)
    if end == "Ctrl-C":
        terminal.press("\x03")
    else:
        terminal.process.send_signal(signal.Signals[end])
    assert terminal.end() != 0
    assert terminal.is_restored()
    assert b"Traceback" not in terminal.written


FAILS_AT_A_KEY = """
import sys
from pdlaunch.cli import main, top_view

def fail(*_):
    raise RuntimeError("made up")

top_view.Screen.press = fail
sys.argv[0] = "pdlaunch"
main()
"""


@pytest.mark.processes
def test_an_error_is_told_on_the_terminal_as_it_was(router: DeploymentServer) -> None:
    terminal = Terminal(router.url, program=("-c", FAILS_AT_A_KEY))
    try:
        terminal.until(lambda text: "decode-0" in text)
        terminal.press("s")
        assert terminal.end() == 1
        assert terminal.is_restored()
        assert terminal.written.rfind(b"made up") > terminal.written.rfind(LEAVE_SCREEN)
    finally:
        terminal.close()


@pytest.mark.processes
def test_it_needs_a_terminal(router: DeploymentServer) -> None:
    result = subprocess.run(
        [sys.executable, "-P", "-m", "pdlaunch", "top", router.url],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 2
    assert "needs a terminal; pdlaunch status prints the same once" in result.stderr


def shown(
    snapshot: Snapshot, screen: Screen | None = None, columns: int = 80, rows: int = 24
) -> list[str]:
    lines = lay_out(snapshot, screen or Screen(), columns, rows, ascii_only=False)
    assert len(lines) <= rows
    assert all(line.cell_len <= columns for line in lines)
    return [line.plain for line in lines]


@pytest.mark.parametrize(("columns", "rows"), [(20, 6), (80, 24), (132, 50), (400, 200)])
@pytest.mark.parametrize("number", [1, 1000])
def test_it_fits_any_screen_and_says_what_it_leaves_out(
    columns: int, rows: int, number: int
) -> None:
    status = deployment(*(engine(f"decode-{n}", "decode") for n in range(number)))
    lines = shown(Snapshot(status, [request("r")] * number), None, columns, rows)
    text = "\n".join(lines)
    if (columns, rows) == (80, 24):
        assert "keys" not in text
        assert lines[-1].startswith("q quit")
        assert ("more" in text) == (number == 1000)


def test_it_works_without_unicode() -> None:
    lines = lay_out(
        Snapshot(deployment(), [request("r")]), Screen(trace=None), 80, 24, ascii_only=True
    )
    text = "\n".join(line.plain for line in lines)
    assert text.isascii()
    opened = lay_out(Snapshot(deployment()), Screen(trace=trace("r")), 80, 24, ascii_only=True)
    assert "#" in "\n".join(line.plain for line in opened)


def test_names_of_others_are_no_commands_and_no_markup() -> None:
    status = deployment(engine(HOSTILE, "decode"), model=HOSTILE)
    text = "\n".join(shown(Snapshot(status, [request(HOSTILE)]), columns=200))
    assert "\x1b" not in text
    assert r"[red]x[/red]\x1b[31m" in text


def test_what_cannot_be_read_is_said_and_the_last_stays() -> None:
    text = "\n".join(shown(Snapshot(deployment(), error="it cannot be reached")))
    assert "decode-0" in text
    assert "it cannot be reached" in text


def test_an_engine_that_is_left_out_says_so() -> None:
    lines = shown(Snapshot(deployment(engine("decode-0", "decode", health="open"))))
    (row,) = [line for line in lines if line.startswith("  decode-0 ")]
    assert "left out" in row


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_hosts_are_named_where_there_are_several(columns: int) -> None:
    one, other = engine("prefill-0", "prefill"), engine("decode-0", "decode", host="gpu-17.far")
    rows = shown(Snapshot(deployment(one, other)), columns=columns)
    heading = next(row for row in rows if row.startswith("  engine "))
    found = {row.split()[0]: row for row in rows if " ready " in row}
    at = heading.index("host")
    assert found["prefill-0"][at:].startswith("127.0.0.1 ")
    assert found["decode-0"][at:].startswith("gpu-17.far ")
    for word in ("state", "load", "wait", "dev/host/pull"):
        assert word in heading
    end = heading.index("dev/host/pull") + len("dev/host/pull")
    assert found["decode-0"][:end].endswith("30%/10%/20%"), "columns lie under their headings"
    assert ("1.5GB/s" in found["decode-0"]) == (columns >= 100)
    # Those of one host, as of most launches, are left out.
    assert "host " not in next(row for row in shown(Snapshot(deployment())) if "engine " in row)


def test_a_dead_engine_is_told_without_colour_and_sorted_to_the_top() -> None:
    dead = engine("decode-9", "decode", state="starting", is_down=True)
    status = deployment(engine("decode-0", "decode"), dead)
    screen = Screen()
    for _ in range(3):
        screen = screen.press("s", 0)
    lines = shown(Snapshot(status), screen)
    rows = [line for line in lines if line.startswith("  decode-")]
    assert "DOWN" in rows[0]
    assert "2 down" in lines[0]
