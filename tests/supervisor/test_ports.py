from __future__ import annotations

import os
import socket

import pytest

from pdlaunch.errors import StartupError
from pdlaunch.supervisor.ports import check_port


def test_a_free_port_is_fine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    check_port("127.0.0.1", port)


def test_a_busy_port_is_named_with_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StartupError, match=rf"port {port} .*pid {os.getpid()}\)"):
            check_port("127.0.0.1", port)


def test_a_foreign_address_is_refused() -> None:
    with pytest.raises(StartupError, match=r"192\.0\.2\.1 is no address of this machine"):
        check_port("192.0.2.1", 8000)
