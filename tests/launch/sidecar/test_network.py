from __future__ import annotations

import socket

import pytest
import zmq

from pdlaunch.errors import StartupError
from pdlaunch.launch.sidecar.network import SideChannelPort, named_devices
from pdlaunch.machine.network import device_of


def free_range(size: int) -> str:
    """Ports of 127.0.0.1 that are free now; the test has them for itself."""
    for first in range(23_000, 30_000, size):
        try:
            for port in range(first, first + size):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return f"{first}-{first + size - 1}"
    raise AssertionError("no free ports")


@pytest.fixture
def not_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take 127.0.0.1 for an address that others reach: a test opens nothing to them."""
    monkeypatch.setattr("pdlaunch.launch.sidecar.network.is_loopback", lambda _: False)


@pytest.mark.usefixtures("not_loopback")
def test_ports_of_a_range_are_kept_for_their_engines() -> None:
    ports = free_range(3)
    first, last = map(int, ports.split("-"))
    kept = [SideChannelPort("127.0.0.1", ports) for _ in range(3)]
    assert sorted(each.number for each in kept) == list(range(first, last + 1))
    with pytest.raises(StartupError, match=f"no port {ports} of 127.0.0.1 can be had"):
        SideChannelPort("127.0.0.1", ports)
    # UCX and others take it for busy; the engine's ZMQ socket listens there, and again after it.
    for _ in range(2):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", kept[0].number))
        with zmq.Context() as context, context.socket(zmq.ROUTER) as engine:
            engine.bind(f"tcp://127.0.0.1:{kept[0].number}")
    kept[1].close()
    again = SideChannelPort("127.0.0.1", ports)
    assert again.number == kept[1].number
    for each in (kept[0], kept[2], again):
        each.close()


def test_on_loopback_it_is_any_free_port() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        port = SideChannelPort(host, "1-1")
        assert port.number > 1
        assert port.host == host
        port.close()


def test_ucx_gets_the_name_of_the_device_that_has_the_address() -> None:
    name = device_of("127.0.0.1")
    assert named_devices({"UCX_NET_DEVICES": "127.0.0.1,mlx5_0:1"}) == {
        "UCX_NET_DEVICES": f"{name},mlx5_0:1"
    }
    assert named_devices({}) == {}
    with pytest.raises(StartupError, match=r"no network device .* 192\.0\.2\.1"):
        named_devices({"UCX_NET_DEVICES": "192.0.2.1"})
