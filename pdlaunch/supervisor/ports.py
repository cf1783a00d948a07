"""Whether the public port is free, asked before anything is started."""

from __future__ import annotations

import errno
import socket

import psutil

from pdlaunch.errors import StartupError


def check_port(host: str, port: int) -> None:
    """Raises StartupError naming what is wrong with ``host:port``, and who holds a busy port where that can be seen."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise StartupError(f"host {host!r} is no address of this machine: {error}") from None
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # As the router does: a port whose last connections are still fading away is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise StartupError(_explain(host, port, error)) from None


def _explain(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} of {host} is busy{_holder(port)}; free it, or choose another one with --port"
        case errno.EACCES:
            return f"port {port} needs privileges; choose one from 1024 on with --port"
        case errno.EADDRNOTAVAIL:
            return f"host {host} is no address of this machine; choose another one with --host"
        case _:
            return f"cannot listen on {host}:{port}: {error.strerror}"


def _holder(port: int) -> str:
    """Empty when the system does not say: other users' processes are hidden."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return ""
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port and connection.pid:
            try:
                return f" (held by {psutil.Process(connection.pid).name()}, pid {connection.pid})"
            except psutil.Error:
                return f" (held by pid {connection.pid})"
    return ""
