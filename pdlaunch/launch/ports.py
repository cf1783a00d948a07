"""Opens the public address. The supervisor listens before it starts processes; the current router
accepts connections from the inherited sockets.
"""

import contextlib
import socket
from collections.abc import Iterator

from pdlaunch.errors import StartupError
from pdlaunch.machine.network import why_not_listening
from pdlaunch.protocol.process.bootstrap import LISTEN_BACKLOG


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Listen at ``port`` of all addresses of ``host`` until the block ends; yield the sockets.

    Port 0 is a free port, the same for all addresses. Children inherit the sockets only if they
    are passed explicitly. Raises StartupError with the reason if an address cannot be used.
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
