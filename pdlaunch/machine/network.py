"""Finds addresses of this machine, and what the kernel tells and grants of its TCP sockets."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_ELSEWHERE = ("192.0.2.1", "2001:db8::1")  # addresses of nobody, whose route is the default one
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


LOOPBACK_DEVICE = "lo"
_SO_ATTACH_FILTER = 26
_NETWORK_HEADER = 0xFFF00000  # SKF_NET_OFF: offsets from here count from the IP header
_LOAD_WORD, _LOAD_BYTE, _SHIFT_RIGHT, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x30, 0x74, 0x15, 0x06
_WHOLE_PACKET = 0xFFFFFFFF
_LISTENING = "0A"
_END_UNREAD = frozenset({"08", "09"})
# States in which the end of the stream counts as one byte. Source: net/tcp_states.h.
_END_UNSENT = frozenset({"04", "09", "0B"})
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


@dataclass(frozen=True, slots=True)
class Listener:
    """Names a TCP socket of this process that listens."""

    fd: int
    address: str
    port: int


def listeners() -> frozenset[Listener]:
    """Return the TCP sockets that this process listens on."""
    return frozenset(
        Listener(connection.fd, connection.laddr.ip, connection.laddr.port)
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    )


def bind_to_loopback(listener: Listener) -> None:
    """Keep packets of other hosts from a socket, whatever address it listens on.

    Raises OSError.

    Source: SO_BINDTODEVICE in socket(7); since Linux 5.7 without a capability, for sockets that
    have no device yet.
    """
    with socket.socket(fileno=os.dup(listener.fd)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, LOOPBACK_DEVICE.encode())


def admit_one_address(listener: Listener, address: str) -> None:
    """Keep packets to other addresses than this one from a socket, and from its connections.

    It is what a bind to the address would have done; a socket that listens cannot be bound again.
    Raises OSError.

    Source: SO_ATTACH_FILTER in socket(7); linux/filter.h.
    """
    packed = ipaddress.ip_address(address).packed
    # The destination in a header of IPv4, or of IPv6; the version is in the first four bits.
    version, offset = (4, 16) if len(packed) == 4 else (6, 24)
    # A classic BPF program: the kernel runs it for each packet before the socket sees it.
    words = struct.unpack(f"!{len(packed) // 4}I", packed)
    checks: list[tuple[int, int, int, int]] = [
        (_LOAD_BYTE, 0, 0, _NETWORK_HEADER),
        (_SHIFT_RIGHT, 0, 0, 4),
        (_JUMP_IF_EQUAL, 0, 2 * len(words) + 1, version),
    ]
    for place, word in enumerate(words):
        left = 2 * (len(words) - place) - 1
        checks.append((_LOAD_WORD, 0, 0, _NETWORK_HEADER + offset + 4 * place))
        checks.append((_JUMP_IF_EQUAL, 0, left, word))
    checks += [(_RETURN, 0, 0, _WHOLE_PACKET), (_RETURN, 0, 0, 0)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *check) for check in checks))
    program = struct.pack("HP", len(checks), ctypes.addressof(code))
    with socket.socket(fileno=os.dup(listener.fd)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def is_connected(port: int, address: str) -> bool:
    """Return whether this process holds a connection from ``address`` to its own ``port``."""
    return any(
        connection.laddr.port == port
        and connection.raddr
        and connection.raddr.ip.removeprefix("::ffff:") == address
        for connection in psutil.Process().net_connections("tcp")
    )


def has_bytes_under_way(port: int, tables: tuple[Path, ...] = _TABLES) -> bool:
    """Return whether a connection to ``port`` on this host holds bytes that nobody has read yet.

    Bytes wait at the receiver's end or, when that is full, at the sender's; both ends are in the
    tables of one host, and those of processes that have ended stay there until the bytes have left.
    """
    for _, local, remote, state, queues, *_ in _lines(tables):
        sending, receiving = queues.split(":")
        unsent = int(sending, 16) - (state in _END_UNSENT)
        unread = int(receiving, 16) - (state in _END_UNREAD)
        if state != _LISTENING and (
            (_port(local) == port and unread > 0) or (_port(remote) == port and unsent > 0)
        ):
            return True
    return False


def foreign_listener(port: int, tables: tuple[Path, ...] = _TABLES) -> int | None:
    """Return the id of another user whose program listens at ``port``, of whichever address; None:
    there is none. Root is nobody else.
    """
    for _, local, _, state, _, _, _, user, *_ in _lines(tables):
        if state == _LISTENING and _port(local) == port and int(user) not in (0, os.geteuid()):
            return int(user)
    return None


def _lines(tables: tuple[Path, ...]) -> Iterator[list[str]]:
    """Yield the columns of each socket. Source: proc_net_tcp.txt of the Linux kernel."""
    for table in tables:
        if table.is_file():
            yield from map(str.split, table.read_text().splitlines()[1:])


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)
