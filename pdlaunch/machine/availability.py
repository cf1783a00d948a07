"""Asks by trying whether a port can be used; never raises."""

from __future__ import annotations

import contextlib
import errno
import socket

import psutil


def probe_port(host: str, port: int) -> str:
    """Return why an address cannot be listened on; empty: it can. Port 0 only asks for the host."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name may have several addresses, and a server listens at all of them.
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                # As servers do: a port whose last connections are still fading away is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    # As servers do, too: who has the port over IPv4 alone does not matter.
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except (OSError, UnicodeError, ValueError) as error:
        return why_not_listening(port, error)
    return ""


def why_not_listening(port: int, error: OSError | UnicodeError | ValueError) -> str:
    """Return what the error says of an address at which nobody could listen."""
    if not isinstance(error, OSError) or isinstance(error, socket.gaierror):
        return f"it is no address of this machine ({getattr(error, 'strerror', None) or error})"
    match error.errno:
        case errno.EADDRINUSE:
            return f"it is busy{_holder(port)}"
        case errno.EACCES:
            return "it needs privileges, unlike those from 1024 on"
        case errno.EADDRNOTAVAIL:
            return "it is no address of this machine"
        case _:
            return error.strerror or str(error)


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.net_connections(kind="tcp"):
            listens = each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port
            if listens and each.pid:
                return f" (held by {psutil.Process(each.pid).name()}, pid {each.pid})"
    return ""
