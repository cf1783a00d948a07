"""Asks by trying whether a port can be used; never raises."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PortProblem = Literal["busy", "privileged", "not here", "unknown host", "other"]

_PROBLEMS: Mapping[int, PortProblem] = {
    errno.EADDRINUSE: "busy",
    errno.EACCES: "privileged",
    errno.EADDRNOTAVAIL: "not here",
}


@dataclass(frozen=True, slots=True)
class PortState:
    """Says whether an address can be listened on."""

    problem: PortProblem | None = None
    detail: str = ""


def probe_port(host: str, port: int) -> PortState:
    """Return whether an address can be listened on; port 0 (a free one) only asks for the host."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name may have several addresses, and a server listens at all of them.
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                # As servers do: a port whose last connections are still fading away is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except (OSError, UnicodeError, ValueError) as error:
        return why_not_listening(error)
    return PortState()


def why_not_listening(error: OSError | UnicodeError | ValueError) -> PortState:
    """Return what the error says of an address at which nobody could listen."""
    detail = getattr(error, "strerror", None) or str(error)
    if not isinstance(error, OSError) or isinstance(error, socket.gaierror):
        return PortState("unknown host", detail)
    return PortState(_PROBLEMS.get(error.errno or 0, "other"), detail)
