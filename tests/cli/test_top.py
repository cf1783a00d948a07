import signal
from collections.abc import Iterator

import pytest

from tests.cli.deployment_server import DeploymentServer, deployment
from tests.cli.terminal import Terminal
from tests.command_line import invoke

pytestmark = pytest.mark.processes


@pytest.fixture
def terminal(router: DeploymentServer) -> Iterator[Terminal]:
    terminal = Terminal("--url", router.url, "--every", "0.2", NO_COLOR="1")
    yield terminal
    terminal.close()


def test_it_shows_the_deployment_as_it_changes(
    router: DeploymentServer, terminal: Terminal
) -> None:
    terminal.until(lambda text: "prefill-0 -> decode-0" in text and "gone" in text)
    router.status = deployment(model="changed")
    terminal.until(lambda text: "changed " in text)
    # What was known stays, with the error, until the router answers again.
    answer = router.answer
    router.answer = lambda path, key: (200, b"[" * 200_000)  # type: ignore[method-assign]
    terminal.until(lambda text: "not as a deployment" in text and "changed " in text)
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
    result = invoke(["top", "--url", router.url])
    assert result.exit_code == 2
    assert "needs a terminal; pdlaunch status prints the same once" in result.stderr
