"""``pdlaunch top`` on a real pseudo-terminal."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from pdlaunch.cli.top import Poller, Screen, Snapshot, lay_out
from pdlaunch.launch.client.api import Api
from tests.cli.deployment_server import (
    HOSTILE,
    DeploymentServer,
    deployment,
    engine,
    request,
    running_server,
    trace,
)
from tests.cli.terminal import ROOT, Terminal


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
    rows = [line.split()[0] for line in text.splitlines() if line.startswith("decode-0 ")]
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


@pytest.mark.parametrize("page", [b"[" * 200_000, b"\xff", b"{}"])
def test_the_poller_outlives_every_answer(router: DeploymentServer, page: bytes) -> None:
    """It tells the error, and then what is so again."""
    answer = router.answer
    router.answer = lambda path, key: (200, page)  # type: ignore[method-assign]
    poller = Poller(Api(router.url, timeout_s=30.0), 0.01)
    poller.start()
    try:
        until(lambda: poller.snapshot.error)
        router.answer = answer  # type: ignore[method-assign]
        until(lambda: poller.snapshot.status is not None and not poller.snapshot.error)
    finally:
        poller.stop()


def until(condition: Callable[[], object]) -> None:
    deadline_at = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_at
        time.sleep(0.01)


def shown(
    snapshot: Snapshot,
    screen: Screen | None = None,
    columns: int = 80,
    rows: int = 24,
    *,
    ascii_only: bool = False,
) -> list[str]:
    console = Console(file=io.StringIO(), width=columns, height=rows, color_system=None)
    page = lay_out(snapshot, screen or Screen(), columns, rows, ascii_only=ascii_only)
    lines = console.render_lines(page, console.options.update(height=rows))
    assert len(lines) == rows
    assert all(sum(segment.cell_length for segment in line) <= columns for line in lines)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


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
    text = "\n".join(shown(Snapshot(deployment(), [request("r")]), ascii_only=True))
    assert text.isascii()
    opened = shown(Snapshot(deployment()), Screen(trace=trace("r")), ascii_only=True)
    assert "#" in "\n".join(opened)


def test_names_of_others_are_no_commands_and_no_markup() -> None:
    status = deployment(engine(HOSTILE, "decode"), model=HOSTILE)
    text = "\n".join(shown(Snapshot(status, [request(HOSTILE)]), columns=200))
    assert "\x1b" not in text
    assert r"[red]x[/red]\x1b[31m" in text


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_hosts_are_named_where_there_are_several(columns: int) -> None:
    one, other = engine("prefill-0", "prefill"), engine("decode-0", "decode", host="gpu-17.far")
    rows = shown(Snapshot(deployment(one, other)), columns=columns)
    heading = next(row for row in rows if row.startswith("engine "))
    found = {row.split()[0]: row for row in rows if " ready " in row}
    at = heading.index("host")
    assert found["prefill-0"][at:].startswith("127.0.0.1 ")
    assert found["decode-0"][at:].startswith("gpu-17.far ")
    for word in ("state", "load", "wait", "dev/host/pull"):
        assert word in heading
    end = heading.index("dev/host/pull") + len("dev/host/pull")
    assert found["decode-0"][:end].endswith("30%/10%/20%"), "columns lie under their headings"
    # Those of one host, as of most launches, are left out.
    assert "host " not in next(row for row in shown(Snapshot(deployment())) if "engine " in row)


def test_a_dead_engine_is_told_without_colour_and_sorted_to_the_top() -> None:
    dead = engine("decode-9", "decode", state="starting", is_down=True)
    status = deployment(engine("decode-0", "decode"), dead)
    screen = Screen()
    for _ in range(3):
        screen = screen.press("s", 0)
    lines = shown(Snapshot(status), screen)
    rows = [line for line in lines if line.startswith("decode-")]
    assert "DOWN" in rows[0]
    assert "2 down" in lines[0]
