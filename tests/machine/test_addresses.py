from __future__ import annotations

import socket

import pytest

from pdlaunch.machine import network
from pdlaunch.machine.network import address_towards, default_address, tcp_endpoint


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_address_on_a_route_is_the_one_that_packets_would_have(address: str) -> None:
    assert address_towards(address) == address


def test_without_a_route_there_is_none() -> None:
    assert address_towards("no-such-host.invalid") is None


def test_a_default_route_over_loopback_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_ELSEWHERE", ("127.0.0.1", "::1"))
    assert default_address() is None


def test_endpoints_of_both_families_are_what_zmq_reads() -> None:
    assert tcp_endpoint("10.0.0.7", 5555) == "tcp://10.0.0.7:5555"
    assert tcp_endpoint("fd00::7", 0) == "tcp://[fd00::7]:0"
    assert socket.inet_pton(socket.AF_INET6, "fd00::7")
