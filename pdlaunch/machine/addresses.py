"""Finds the address of this machine on a route; no packet is sent."""

from __future__ import annotations

import ipaddress
import socket

import psutil

_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses of nobody, whose route is the default one."""
_ANY_PORT = 9


def address_towards(host: str) -> str | None:
    """Return the address from which this machine would speak to ``host``; None without a route."""
    try:
        found = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, target = found[0]
        with socket.socket(family, kind, protocol) as probe:
            # It chooses the route and its address, as for any datagram, and sends nothing.
            probe.connect(target)
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None


def default_address() -> str | None:
    """Return this machine's address on its default route; None where it has none but loopback."""
    found = (address_towards(host) for host in _ELSEWHERE)
    return next(
        (each for each in found if each and not ipaddress.ip_address(each).is_loopback), None
    )


def device_of(address: str) -> str | None:
    """Return the network device that has an address of this machine; None where none has."""
    return next(
        (
            name
            for name, found in psutil.net_if_addrs().items()
            if any(each.address.partition("%")[0] == address for each in found)
        ),
        None,
    )


def is_address(text: str) -> bool:
    """Tell whether this is an IP address, and no name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def with_device_names(devices: str) -> str:
    """Return a list with the names of network devices in the place of this machine's addresses.

    Commas stand between them, as in UCX_NET_DEVICES. Raises LookupError for an address that no
    device has.
    """
    names = []
    for name in devices.split(","):
        if is_address(name):
            device = device_of(name)
            if device is None:
                raise LookupError(f"no network device of this host has the address {name}")
            name = device
        names.append(name)
    return ",".join(names)


def tcp_endpoint(address: str, port: int) -> str:
    """Return the ZMQ endpoint of an address, IPv6 in brackets: ``tcp://[fd00::7]:5555``."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
