"""Whether an address can be listened on: asked by binding to it for a moment."""

from __future__ import annotations

import errno
import queue
import socket
import threading
from typing import Any

from pdlaunch.platform.facts import PortState

RESOLVE_TIMEOUT_S = 0.3

_PROBLEMS = {errno.EADDRINUSE: "busy", errno.EACCES: "privileged", errno.EADDRNOTAVAIL: "not here"}


def probe_port(host: str, port: int) -> PortState | None:
    """Never raises; port 0 (a free one) only asks for the host. None: the name of the host was not
    resolved in time.
    """
    found = _resolve(host, port)
    if found is None or isinstance(found, PortState):
        return found
    for family, kind, protocol, _, address in found:
        state = _try_to_bind(family, kind, protocol, address)
        if state.problem:
            return state
    return PortState()


def _try_to_bind(family: int, kind: int, protocol: int, address: Any) -> PortState:
    try:
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: a port whose last connections are still fading away is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        detail = error.strerror or str(error)
        match _PROBLEMS.get(error.errno or 0):
            case "busy":
                return PortState("busy", detail)
            case "privileged":
                return PortState("privileged", detail)
            case "not here":
                return PortState("not here", detail)
            case _:
                return PortState("other", detail)
    return PortState()


def _resolve(host: str, port: int) -> list[tuple[Any, ...]] | PortState | None:
    """In a thread of its own: a name server that does not answer must not hold up the check."""
    answers: queue.SimpleQueue[list[tuple[Any, ...]] | PortState] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(
                list(
                    socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
                )
            )
        except (OSError, UnicodeError, ValueError) as error:
            answers.put(PortState("unknown host", str(error)))

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        return answers.get(timeout=RESOLVE_TIMEOUT_S)
    except queue.Empty:
        return None
