"""Opens the public address: the supervisor listens before anything is started, and each router in
turn accepts.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import psutil

from pdlaunch.errors import StartupError
from pdlaunch.machine.availability import probe_port, why_not_listening
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.protocol.process.bootstrap import LISTEN_BACKLOG

_ATTEMPTS = 16
"""Number of tries to find a port that is free at every address of a host."""


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Listen at ``port`` of all addresses of ``host`` until the block ends.

    0 is a free port, the same for all of them. No child inherits the sockets by itself. Raises
    StartupError naming what is wrong with the address.
    """
    listeners = _listen(host, port)
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


def check_engine_ports(resolved: ResolvedLaunch) -> None:
    """Raise StartupError naming the setting when an engine's port on this host is not free.

    Its server listens there later.
    """
    here = resolved.hosts[0].name
    for address in (each for each in resolved.engine_addresses if each.on == here):
        port = address.port
        state = probe_port(address.host, port)
        if state is not None and state.problem:
            reason = f"busy{_holder(port)}" if state.problem == "busy" else state.detail
            raise StartupError(
                f"port {port} of {address.host} cannot be used: {reason}; free it, or choose "
                f"other ones with {address.where}"
            )


def _listen(host: str, port: int) -> list[socket.socket]:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            found = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            return _listen_at({(family, address): None for family, _, _, _, address in found})
        except (OSError, UnicodeError, ValueError) as error:
            if port or attempt == _ATTEMPTS:
                raise StartupError(_explain(host, port, error)) from error
    raise AssertionError


def _listen_at(addresses: dict[tuple[int, Any], None]) -> list[socket.socket]:
    """Listen as servers do.

    A port whose last connections are fading away is free, and IPv6 does not take IPv4's port.
    """
    with contextlib.ExitStack() as undo:
        sockets: list[socket.socket] = []
        for family, (address, port, *rest) in addresses:
            listener = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address, port or _port_of(sockets), *rest))
            listener.setblocking(False)
            listener.listen(LISTEN_BACKLOG)
            sockets.append(listener)
        undo.pop_all()
        return sockets


def _port_of(sockets: list[socket.socket]) -> int:
    """Return the port that the first address was given; 0 while there is none."""
    return int(sockets[0].getsockname()[1]) if sockets else 0


def _explain(host: str, port: int, error: OSError | UnicodeError | ValueError) -> str:
    """Say what is wrong with an address, who holds a busy port where that can be seen, and what to
    do.
    """
    match why_not_listening(error).problem:
        case "busy":
            return (
                f"port {port} of {host} is busy{_holder(port)}; free it, or choose another one "
                "with --port"
            )
        case "privileged":
            return f"port {port} needs privileges; choose one from 1024 on with --port"
        case "not here" | "unknown host":
            return f"host {host} is no address of this machine; choose another one with --host"
        case _:
            reason = getattr(error, "strerror", None) or error
            return (
                f"cannot listen on {host}:{port}: {reason}; free the port or choose another with "
                "--host and --port"
            )


def _holder(port: int) -> str:
    """Return who holds a busy port; empty when the system does not say, as of other users'
    processes.
    """
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return ""
    for connection in connections:
        listens = (
            connection.status == psutil.CONN_LISTEN
            and connection.laddr
            and connection.laddr.port == port
        )
        if listens and connection.pid:
            try:
                return f" (held by {psutil.Process(connection.pid).name()}, pid {connection.pid})"
            except psutil.Error:
                return f" (held by pid {connection.pid})"
    return ""
