"""Opens the public address: the supervisor listens before anything is started, and each router in
turn accepts.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import psutil

from pdlaunch.errors import StartupError
from pdlaunch.machine.availability import probe_port, why_not_listening
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.protocol.process.bootstrap import LISTEN_BACKLOG


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Listen at ``port`` of all addresses of ``host`` until the block ends.

    0 is a free port, the same for all of them. No child inherits the sockets by itself. Raises
    StartupError naming what is wrong with the address.
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
                # All addresses get the free port that the first one was given.
                free = listeners[0].getsockname()[1] if listeners else port
                # It sets IPV6_V6ONLY, and SO_REUSEADDR for ports in TIME_WAIT.
                listener = socket.create_server(
                    (address[0], free, *address[2:]), family=family, backlog=LISTEN_BACKLOG
                )
                listeners.append(stack.enter_context(listener))
                listener.setblocking(False)
        except (OSError, UnicodeError, ValueError) as error:
            raise StartupError(_explain(host, port, error)) from error
        yield listeners


def check_engine_ports(resolved: ResolvedLaunch) -> None:
    """Raise StartupError naming the setting when an engine's port on this host is not free."""
    here = resolved.hosts[0].name
    for address in (each for each in resolved.engine_addresses if each.on == here):
        port = address.port
        state = probe_port(address.host, port)
        if state.problem:
            reason = f"busy{_holder(port)}" if state.problem == "busy" else state.detail
            raise StartupError(
                f"port {port} of {address.host} cannot be used: {reason}; free it, or choose "
                f"other ones with {address.where}"
            )


def _explain(host: str, port: int, error: OSError | UnicodeError | ValueError) -> str:
    """Say what is wrong with an address, and what to do."""
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
    """Return who holds a busy port, where the system says so."""
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.net_connections(kind="tcp"):
            listens = each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port
            if listens and each.pid:
                return f" (held by {psutil.Process(each.pid).name()}, pid {each.pid})"
    return ""
