import signal
import socket
import subprocess
from pathlib import Path

import pytest

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.deployment import Deployment, held_port


class Serving(subprocess.Popen[bytes]):
    """Heeds no SIGTERM; Ctrl-C is pressed ``num_interrupts`` times while it is waited for."""

    num_interrupts = 0

    def __init__(self) -> None:
        ignores = "trap '' TERM; echo; exec sleep 600"
        super().__init__(("sh", "-c", ignores), stdout=subprocess.PIPE)
        assert self.stdout is not None
        self.stdout.readline()

    def wait(self, timeout: float | None = None) -> int:
        if self.num_interrupts:
            self.num_interrupts -= 1
            raise KeyboardInterrupt
        return super().wait(timeout)


def stop(process: Serving, timeout_s: float) -> None:
    Deployment(process, "http://127.0.0.1:1", Path("logs"), Path("output"), 0.0).stop(timeout_s)


@pytest.mark.processes
def test_ctrl_c_while_it_stops_is_passed_on_and_ends_nothing_early() -> None:
    process = Serving()
    process.num_interrupts = 2
    with pytest.raises(KeyboardInterrupt):
        stop(process, 180.0)
    assert process.returncode == -signal.SIGINT


@pytest.mark.processes
def test_what_does_not_stop_is_killed() -> None:
    process = Serving()
    with pytest.raises(PdlaunchError, match=r"did not stop within 0\.1 s and was killed"):
        stop(process, 0.1)
    assert process.returncode == -signal.SIGKILL


def test_a_held_port_is_for_the_server_that_is_told_it() -> None:
    with held_port() as port:
        with socket.socket() as stranger, pytest.raises(OSError, match="already in use"):
            stranger.bind(("127.0.0.1", port))
        for _ in range(2):  # as a server that is started again
            with socket.create_server(("127.0.0.1", port)):
                socket.create_connection(("127.0.0.1", port)).close()
