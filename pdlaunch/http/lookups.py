"""Looks up the names of hosts: one that no name server answers delays no other one.

The event loop's own lookups share a few threads with all its other work that blocks, and its end
waits for them. One that nobody answers holds its thread for 10 s and more.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import threading

from aiohappyeyeballs import AddrInfoType


async def look_up(host: str, port: int) -> list[AddrInfoType]:
    """Return the addresses of a host and port. Raises OSError, ValueError.

    The lookup has a thread of its own, which goes on when the task is cancelled: callers see to it
    that there is one at a time for each name. The end of the process does not wait for it.
    """
    answer: concurrent.futures.Future[list[AddrInfoType]] = concurrent.futures.Future()
    answer.set_running_or_notify_cancel()  # a task that is cancelled leaves it as it is

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except Exception as error:
            answer.set_exception(error)
        else:
            answer.set_result([*found])

    try:
        threading.Thread(target=ask, name=f"look up {host}", daemon=True).start()
    except RuntimeError as error:
        raise OSError(f"{host} cannot be looked up: {error}") from error
    return await asyncio.wrap_future(answer)
