"""Finds out whether a port is free by binding it; never raises."""

import contextlib
import errno
import socket
from pathlib import PurePath

import psutil

NOT_HERE = "it is not an address of this machine"  # how the reason begins if any port would fail


def probe_port(host: str, port: int) -> str:
    """Return why a server cannot listen on an address; empty if it can. Port 0 checks the host."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name may have several addresses, and a server listens on all of them.
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                # Servers set this option too, so connections in TIME_WAIT do not block the port.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    # Servers set this option too, so a listener on IPv4 does not matter here.
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except (OSError, UnicodeError, ValueError) as error:
        return why_not_listening(port, error)
    return ""


def why_not_listening(port: int, error: OSError | UnicodeError | ValueError) -> str:
    """Return the reason of an error from binding an address, for people."""
    if not isinstance(error, OSError) or isinstance(error, socket.gaierror):
        return f"{NOT_HERE} ({getattr(error, 'strerror', None) or error})"
    match error.errno:
        case errno.EADDRINUSE:
            return f"it is busy{_holder(port)}"
        case errno.EACCES:
            return "ports below 1024 need privileges"
        case errno.EADDRNOTAVAIL:
            return NOT_HERE
        case _:
            return error.strerror or str(error)


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.net_connections(kind="tcp"):
            listens = each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port
            if listens and each.pid:
                process = psutil.Process(each.pid)
                words = [PurePath(word).name.partition(".")[0] for word in process.cmdline()[:4]]
                name = "another launch of pdlaunch" if "pdlaunch" in words else process.name()
                return f" (held by {name}, pid {each.pid})"
    return ""
