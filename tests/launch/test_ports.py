"""The public address: errors that name it, and sockets that nobody else gets."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from pdlaunch.errors import StartupError
from pdlaunch.machine.network import listening

HAS_IPV6 = socket.has_ipv6 and Path("/proc/net/if_inet6").exists()


def test_a_busy_port_is_named_with_its_holder_and_the_fix() -> None:
    with listening("127.0.0.1", 0) as (listener,):
        port = listener.getsockname()[1]
        expected = rf"port {port} of 127.0.0.1 .*busy.*pid {os.getpid()}\); .*--port"
        with pytest.raises(StartupError, match=expected), listening("127.0.0.1", port):
            pass


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a" * 300])
def test_a_foreign_address_is_refused(host: str) -> None:
    expected = rf"{host} .*it is not an address of this machine.*--host"
    with pytest.raises(StartupError, match=expected), listening(host, 0):
        pass


@pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")
def test_every_address_of_a_host_gets_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[Any] = [
        (socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: addresses)
    with listening("both.example", 0) as listeners:
        names = [listener.getsockname() for listener in listeners]
        assert [name[0] for name in names] == ["::1", "127.0.0.1"]
        assert len({name[1] for name in names}) == 1


def test_a_port_whose_last_connections_fade_away_is_free() -> None:
    with listening("127.0.0.1", 0) as (listener,):
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            listener.setblocking(True)
            listener.accept()[0].close()
            assert client.recv(1) == b""
    with listening("127.0.0.1", port):
        pass
