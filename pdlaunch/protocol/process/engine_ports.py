"""Holds the ports of engines on this host after their servers have died.

::

    server       listens ── dies                                   the next server listens
    supervisor   is bound too ── no other user can listen, connections are refused ──▶

Routers learn of a death some milliseconds late. Until then, another listener at the port would get
prompts and the launch's token. Two sockets of one user may share a port if both have SO_REUSEPORT,
and one of them need not listen. Source: socket(7).
"""

import socket
from collections import defaultdict
from urllib.parse import urlsplit

from pdlaunch.config.http_names import is_loopback

# Servers of an engine whose ports are held: a slow router may know only the previous server
_SERVERS = 2


def bind_to_share(host: str, port: int, *, is_kept: bool) -> socket.socket:
    """Bind a server's socket so that ``EnginePorts`` can hold its port; 0: a free port.

    ``is_kept``: the supervisor holds the port of a dead server. Otherwise the port must be free,
    because two launches of one user may have the same port in their settings. Raises OSError.
    """
    bound = _socket(host)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_kept and port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        bound.close()
        raise
    return bound


class EnginePorts:
    """Holds the ports of each engine's last servers while the engine is part of the launch."""

    def __init__(self) -> None:
        self._sockets: defaultdict[str, dict[str, socket.socket]] = defaultdict(dict)
        """Sockets by engine and URL, the oldest first."""

    def __contains__(self, engine: object) -> bool:
        return bool(self._sockets.get(str(engine)))

    def keep(self, engine: str, url: str) -> None:
        """Hold the port at which the engine's server already listens.

        Only for plain HTTP on loopback: with TLS, servers authenticate themselves to routers.
        """
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if parts.scheme != "http" or not port or not is_loopback(host):
            return
        if url in (sockets := self._sockets[engine]):
            return
        kept = _socket(host)
        # Without SO_REUSEADDR, with which other users could share the port.
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            kept.bind((host, port))
        except OSError:
            kept.close()
            return
        sockets[url] = kept
        if len(sockets) > _SERVERS:
            sockets.pop(next(iter(sockets))).close()

    def release(self, engine: str) -> None:
        for kept in self._sockets.pop(engine, {}).values():
            kept.close()

    def close(self) -> None:
        for engine in list(self._sockets):
            self.release(engine)


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
