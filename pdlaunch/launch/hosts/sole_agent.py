"""Lets one agent of this machine serve a host of a launch.

With two of them engines would run twice: those of an agent that is stopped or cut off, and those of
its successor.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import socket
import struct
from collections.abc import Iterator

from pdlaunch.errors import StartupError
from pdlaunch.launch.hosts.join import JoinTicket

_BACKLOG = 128
"""So many refused agents can learn who was there before them."""
_CREDENTIALS = struct.Struct("3i")


@contextlib.contextmanager
def sole_agent(ticket: JoinTicket, name: str) -> Iterator[None]:
    """Hold the name of a host in a launch. Raises StartupError while another process holds it.

    What is held is an abstract Unix socket. The kernel frees it when the agent ends, however it
    ends; and it knows no users, but network namespaces, as the addresses of hosts do.
    """
    launch = hashlib.sha256(f"{ticket.server_public} {name}".encode()).hexdigest()
    address = f"\0pdlaunch-agent-{launch}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as holder:
        try:
            holder.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise StartupError(f"{name} cannot be held here: {error.strerror}") from None
            raise StartupError(
                f"{_who_listens(address)} serves {name} of this launch on this machine already; "
                "with two, engines would run twice: end it, or choose another --name"
            ) from None
        holder.listen(_BACKLOG)
        yield


def _who_listens(address: str) -> str:
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking,
    ):
        asking.setblocking(False)
        asking.connect(address)
        found = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process, _, _ = _CREDENTIALS.unpack(found)
        # 0: it is in a PID namespace that this process does not see.
        if process:
            return f"the agent with process id {process}"
    return "another agent"
