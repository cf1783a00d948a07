"""Finds the listening sockets that a library has opened, and what the kernel holds for them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

LOOPBACK_DEVICE = "lo"
_LISTENING = "0A"
_END_UNREAD = frozenset({"08", "09"})
_END_UNSENT = frozenset({"04", "09", "0B"})
"""States in which the end of the stream counts as one byte. Source: net/tcp_states.h."""
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


def bound_device(listener: Listener) -> str:
    """Return the name of the device that a socket is bound to; empty: any."""
    with socket.socket(fileno=os.dup(listener.fd)) as listening:
        return (
            listening.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
            .rstrip(b"\0")
            .decode()
        )


def can_bind_to_loopback() -> bool:
    """Return whether the kernel lets this process bind sockets to a device; never raises."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, LOOPBACK_DEVICE.encode())
    except (OSError, AttributeError):
        return False
    return True


def has_bytes_under_way(port: int, tables: tuple[Path, ...] = _TABLES) -> bool:
    """Return whether a connection to ``port`` on this host holds bytes that nobody has read yet.

    Bytes wait at the receiver's end or, when that is full, at the sender's; both ends are in the
    tables of one host, and those of processes that have ended stay there until the bytes have left.
    """
    for local_port, remote_port, state, sending, receiving in _connections(tables):
        if state != _LISTENING and (
            (local_port == port and receiving > 0) or (remote_port == port and sending > 0)
        ):
            return True
    return False


def _connections(tables: tuple[Path, ...]) -> Iterator[tuple[int, int, str, int, int]]:
    for table in tables:
        if not table.is_file():
            continue
        for line in table.read_text().splitlines()[1:]:
            _, local, remote, state, queues, *_ = line.split()
            sending, receiving = queues.split(":")
            unsent = int(sending, 16) - (state in _END_UNSENT)
            unread = int(receiving, 16) - (state in _END_UNREAD)
            yield _port(local), _port(remote), state, unsent, unread


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)
