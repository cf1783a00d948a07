"""Addresses of this machine, and what the kernel says about this process' TCP sockets."""

import os
import socket
from pathlib import Path

import pytest

from pdlaunch.machine import network

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_address_on_a_route_is_the_one_that_packets_would_have(address: str) -> None:
    assert network.address_towards(address) == address


def test_without_a_route_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.address_towards("no-such-host.invalid") is None
    monkeypatch.setattr(network, "_ELSEWHERE", ("127.0.0.1", "::1"))
    assert network.default_address() is None, "a default route over loopback is none"


def bound_device(listener: network.Listener) -> bytes:
    with socket.socket(fileno=os.dup(listener.fd)) as listening:
        return listening.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")


def test_a_new_listener_is_found_and_bound_to_loopback() -> None:
    before = network.listeners()
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        (listener,) = network.listeners() - before
        assert (listener.address, listener.port) == server.getsockname()
        assert bound_device(listener) == b""
        network.bind_to_loopback(listener)
        assert bound_device(listener) == b"lo"
        with socket.create_connection(("127.0.0.1", listener.port), timeout=10):
            server.accept()[0].close()


@pytest.mark.parametrize(
    ("family", "mine", "other"),
    [(socket.AF_INET, "127.0.0.1", "127.0.0.2"), (socket.AF_INET6, "::1", "127.0.0.1")],
)
def test_a_listener_takes_packets_to_one_address_alone(
    family: socket.AddressFamily, mine: str, other: str
) -> None:
    before = network.listeners()
    any_address = "0.0.0.0" if family is socket.AF_INET else "::"
    with socket.create_server(
        (any_address, 0), family=family, dualstack_ipv6=family is socket.AF_INET6
    ) as server:
        (listener,) = network.listeners() - before
        socket.create_connection((other, listener.port), timeout=10).close()
        server.accept()[0].close()
        network.admit_one_address(listener, mine)
        with socket.create_connection((mine, listener.port), timeout=10) as client:
            accepted, _ = server.accept()
            client.sendall(bytes(1 << 20))
            left = 1 << 20
            while left:
                left -= len(accepted.recv(left))
            assert network.is_connected(listener.port, mine)
            assert not network.is_connected(listener.port, other)
            accepted.close()
        assert not network.is_connected(listener.port, mine)
        with pytest.raises(TimeoutError):
            socket.create_connection((other, listener.port), timeout=0.3)


def test_bytes_are_under_way_until_they_are_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as client,
            server.accept()[0] as accepted,
        ):
            assert not network.has_bytes_under_way(port)
            client.sendall(b"x" * 1000)
            client.close()
            assert network.has_bytes_under_way(port), "also when the sender is gone"
            while accepted.recv(300):
                pass
            assert not network.has_bytes_under_way(port)


def test_listening_sockets_and_other_ports_do_not_count(tmp_path: Path) -> None:
    table = tmp_path / "tcp"
    header = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  "
        "timeout inode\n"
    )
    row = "   0: 0100007F:{:04X} 0100007F:{:04X} {} {:08X}:{:08X} 00:00000000 00000000 0 0 1 1\n"

    def under_way(local: int, remote: int, state: str, sending: int, receiving: int) -> bool:
        table.write_text(header + row.format(local, remote, state, sending, receiving))
        return network.has_bytes_under_way(7000, (table, tmp_path / "none"))

    assert under_way(7000, 9, "01", 0, 5)
    assert under_way(9, 7000, "04", 5, 0)
    assert under_way(7000, 9, "08", 0, 2)
    assert not under_way(7000, 9, "08", 0, 1), "only the end of the stream"
    assert not under_way(9, 7000, "04", 1, 0), "only the end of the stream"
    assert not under_way(7000, 9, "0A", 0, 5)
    assert not under_way(7000, 9, "01", 5, 0)
    assert not under_way(9, 7000, "01", 0, 5)
    assert not under_way(9, 7001, "01", 5, 5)
