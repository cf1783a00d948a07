"""Finds addresses and free ports of this machine; inspects and restricts TCP sockets."""

import contextlib
import ctypes
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import psutil

from pdlaunch.errors import StartupError

_ELSEWHERE = ("192.0.2.1", "2001:db8::1")  # Documentation addresses, reached by the default route
_ANY_PORT = 9


def address_towards(host: str) -> str | None:
    """Return this machine's source address on the route to ``host``; None without a route."""
    try:
        found = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, target = found[0]
        with socket.socket(family, kind, protocol) as probe:
            # Connecting a UDP socket chooses the route and the source address, and sends nothing.
            probe.connect(target)
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None


def default_address() -> str | None:
    """Return this machine's address on its default route; None if it has only loopback."""
    found = (address_towards(host) for host in _ELSEWHERE)
    return next(
        (each for each in found if each and not ipaddress.ip_address(each).is_loopback), None
    )


def device_of(address: str) -> str | None:
    """Return the name of the network device that has this address; None if no device has it."""
    return next(
        (
            name
            for name, found in psutil.net_if_addrs().items()
            if any(each.address.partition("%")[0] == address for each in found)
        ),
        None,
    )


def with_device_names(devices: str) -> str:
    """Replace addresses in a list such as UCX_NET_DEVICES by devices. Raises LookupError."""
    names = []
    for name in devices.split(","):
        with contextlib.suppress(ValueError):
            device = device_of(str(ipaddress.ip_address(name)))
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
# TCP states in which the kernel counts the end of the stream (FIN) as one byte in the queue of
# unread or unsent bytes. Source: net/tcp_states.h.
_END_UNSENT = frozenset({"04", "09", "0B"})
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


@dataclass(frozen=True, slots=True)
class Listener:
    fd: int
    address: str
    port: int


def listeners() -> frozenset[Listener]:
    """Return the listening TCP sockets of this process."""
    return frozenset(
        Listener(connection.fd, connection.laddr.ip, connection.laddr.port)
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    )


def bind_to_loopback(listener: Listener) -> None:
    """Make a listening socket drop packets from other hosts. Raises OSError.

    Source: SO_BINDTODEVICE in socket(7). Since Linux 5.7 this needs no capability for sockets that
    are not bound to a device yet.
    """
    with socket.socket(fileno=os.dup(listener.fd)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, LOOPBACK_DEVICE.encode())


def admit_one_address(listener: Listener, address: str) -> None:
    """Make a listening socket and its connections drop packets to any other address.

    A socket that listens already cannot be bound to the address. Raises OSError.
    Source: SO_ATTACH_FILTER in socket(7); linux/filter.h.
    """
    packed = ipaddress.ip_address(address).packed
    # IP version (first four bits of the header) and the offset of the destination address.
    version, offset = (4, 16) if len(packed) == 4 else (6, 24)
    # A classic BPF program, which the kernel runs on each packet before the socket gets it.
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
    """Return True if this process has a connection from ``address`` to its own ``port``."""
    return any(
        connection.laddr.port == port
        and connection.raddr
        and connection.raddr.ip.removeprefix("::ffff:") == address
        for connection in psutil.Process().net_connections("tcp")
    )


def has_bytes_under_way(port: int, tables: tuple[Path, ...] = _TABLES) -> bool:
    """Return True if a connection to ``port`` on this host has unread bytes.

    The bytes are in the receiver's queue or, when that is full, in the sender's. The kernel's
    tables have both ends, and keep the ends of dead processes until their bytes are sent.
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
    """Return the id of another user, except root, who listens on ``port``; None: nobody."""
    for _, local, _, state, _, _, _, user, *_ in _lines(tables):
        if state == _LISTENING and _port(local) == port and int(user) not in (0, os.geteuid()):
            return int(user)
    return None


def _lines(tables: tuple[Path, ...]) -> Iterator[list[str]]:
    """Yield the columns of each row. Source: proc_net_tcp.txt of the Linux kernel."""
    for table in tables:
        if table.is_file():
            yield from map(str.split, table.read_text().splitlines()[1:])


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


LISTEN_BACKLOG = 1024
NOT_HERE = "it is not an address of this machine"  # how the reason begins if any port would fail


def probe_port(host: str, port: int) -> str:
    """Return why a server cannot listen on an address; empty if it can. Port 0 checks the host."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name may have several addresses, and a server listens on all of them.
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                # Servers set this option too, so connections in TIME_WAIT do not block the port.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    # Servers set this option too, so a listener on IPv4 does not matter here.
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except (OSError, UnicodeError, ValueError) as error:
        return why_not_listening(port, error)
    return ""


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Listen at ``port`` (0: any) of all addresses of ``host``. Children inherit these sockets only
    if they are passed explicitly, as to the router, which accepts there. Raises StartupError.
    """
    with contextlib.ExitStack() as stack:
        listeners: list[socket.socket] = []
        try:
            found = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            for family, address in dict.fromkeys(
                (family, address) for family, *_, address in found
            ):
                # All addresses use the free port that the first one got.
                free = listeners[0].getsockname()[1] if listeners else port
                # create_server sets IPV6_V6ONLY, and SO_REUSEADDR for ports in TIME_WAIT.
                listener = socket.create_server(
                    (address[0], free, *address[2:]), family=family, backlog=LISTEN_BACKLOG
                )
                listeners.append(stack.enter_context(listener))
                listener.setblocking(False)
        except (OSError, UnicodeError, ValueError) as error:
            raise StartupError(
                f"port {port} of {host} cannot be used: {why_not_listening(port, error)}; free "
                "it, or choose another address with --host and --port"
            ) from error
        yield listeners


def why_not_listening(port: int, error: OSError | UnicodeError | ValueError) -> str:
    """Return the reason of an error from binding an address, for people."""
    if not isinstance(error, OSError) or isinstance(error, socket.gaierror):
        return f"{NOT_HERE} ({getattr(error, 'strerror', None) or error})"
    match error.errno:
        case errno.EADDRINUSE:
            return f"it is busy{_holder(port)}"
        case errno.EACCES:
            return "ports below 1024 need privileges"
        case errno.EADDRNOTAVAIL:
            return NOT_HERE
        case _:
            return error.strerror or str(error)


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.net_connections(kind="tcp"):
            listens = each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port
            if listens and each.pid:
                process = psutil.Process(each.pid)
                words = [PurePath(word).name.partition(".")[0] for word in process.cmdline()[:4]]
                name = "another launch of pdlaunch" if "pdlaunch" in words else process.name()
                return f" (held by {name}, pid {each.pid})"
    return ""
