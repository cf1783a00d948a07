"""Listens at the Unix socket for commands: whoever can open it may command."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from aiohttp import web

BACKLOG = 32


async def listen_at_admin_socket(
    app: web.Application, path: Path, *, shutdown_timeout_s: float = 0.0
) -> web.AppRunner:
    """Listen at ``path``; the caller cleans the runner up. Raises OSError.

    It has a runner of its own: clients that take all connections of the public address lock nobody
    out here.
    """
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=shutdown_timeout_s,
        auto_decompress=False,
    )
    await runner.setup()
    # Under its own name only once it listens: commands wait at the socket that an earlier router
    # has left there, and would not where there is none.
    new = path.with_name(f"{path.name}.new")
    await web.SockSite(runner, _bind(new), backlog=BACKLOG).start()
    new.replace(path)
    return runner


def _bind(path: Path) -> socket.socket:
    """Bind a socket of mode 0600."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Linux gives the file the mode of the socket, less the umask.
    os.fchmod(listener.fileno(), 0o600)
    listener.bind(str(path))
    return listener


def came_through_admin_socket(http: web.Request) -> bool:
    """Tell whether the request's connection is one of the admin socket."""
    connection = None if http.transport is None else http.transport.get_extra_info("socket")
    return connection is not None and connection.family == socket.AF_UNIX
