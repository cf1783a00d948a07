from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from pdlaunch.errors import PdlaunchError
from pdlaunch.launch.client.deployment import Deployment, held_port


class FakeProcess:
    """Stands for a ``pdlaunch serve`` that ends at signal ``ends_at``.

    While it is waited for, Ctrl-C is pressed ``interrupts`` times.
    """

    def __init__(self, *, ends_at: int, interrupts: int = 0) -> None:
        self.ends_at = ends_at
        self.interrupts = interrupts
        self.signals: list[int] = []
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def wait(self, timeout: float | None = None) -> int:
        if len(self.signals) >= self.ends_at:
            self.returncode = 0
        elif self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        elif self.returncode is None:
            raise subprocess.TimeoutExpired("serve", timeout or 0)
        return self.returncode or 0

    def kill(self) -> None:
        self.returncode = -9

    def __enter__(self) -> FakeProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.wait()


def make(process: Any) -> Deployment:
    return Deployment(process, "http://127.0.0.1:1", Path("logs"), Path("output"), 0.0)


def test_ctrl_c_while_it_stops_is_passed_on_and_ends_nothing_early() -> None:
    process = FakeProcess(ends_at=3, interrupts=2)
    with pytest.raises(KeyboardInterrupt):
        make(process).stop()
    assert process.signals == [signal.SIGTERM, signal.SIGINT, signal.SIGINT]
    assert process.returncode == 0


def test_what_does_not_stop_is_killed() -> None:
    process = FakeProcess(ends_at=2)
    with pytest.raises(PdlaunchError, match="did not stop within 7 s and was killed"):
        make(process).stop(timeout_s=7)
    assert process.returncode == -9


def test_a_held_port_is_for_the_server_that_is_told_it() -> None:
    with held_port() as port:
        with socket.socket() as stranger, pytest.raises(OSError, match="already in use"):
            stranger.bind(("127.0.0.1", port))
        for _ in range(2):  # as a server that is started again
            with socket.create_server(("127.0.0.1", port)):
                socket.create_connection(("127.0.0.1", port)).close()
