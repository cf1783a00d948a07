"""``pdlaunch top`` on a real pseudo-terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.cli.deployment_server import DeploymentServer, deployment, running_server
from tests.cli.terminal import ROOT, Terminal

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def router() -> Iterator[DeploymentServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def terminal(router: DeploymentServer) -> Iterator[Terminal]:
    terminal = Terminal("--url", router.url, "--every", "0.2", NO_COLOR="1")
    yield terminal
    terminal.close()


def test_it_shows_the_deployment_as_it_changes(
    router: DeploymentServer, terminal: Terminal
) -> None:
    text = terminal.until(lambda text: "decode-0" in text)
    for told in ("requests/s", "30%/10%/20%", "prefill-0 -> decode-0", "p2p/posix_fd", "gone"):
        assert told in text
    router.status = deployment(model="changed")
    terminal.until(lambda text: "changed " in text)
    # What was known stays, with the error, until the router answers again.
    answer = router.answer
    router.answer = lambda path, key: (200, b"[" * 200_000)  # type: ignore[method-assign]
    text = terminal.until(lambda text: "not as a deployment" in text)
    assert "changed " in text
    router.answer = answer  # type: ignore[method-assign]
    terminal.until(lambda text: "Ctrl-C ends" in text)


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


def test_it_needs_a_terminal(router: DeploymentServer) -> None:
    result = subprocess.run(
        [sys.executable, "-P", "-m", "pdlaunch", "top", "--url", router.url],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 2
    assert "needs a terminal; pdlaunch status prints the same once" in result.stderr
