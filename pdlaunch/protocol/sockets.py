"""Makes ZMQ sockets that only processes of the same launch can use.

Every socket speaks CURVE with the launch's key pair, and an authenticator admits that key alone:
CURVE without an allow-list lets any fresh key in.
"""

from __future__ import annotations

import secrets
import threading
from typing import Any, ClassVar

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from pdlaunch.protocol.certificates import new_certificate
from pdlaunch.protocol.wire import MAX_FRAME_BYTES


class LaunchKeys(msgspec.Struct, frozen=True):
    """Holds the secrets of a launch: a CURVE key pair (Z85), the token of the HTTP ports, and on
    several hosts their certificate with its private key.
    """

    public: str
    secret: str
    http_token: str
    certificate: str | None = None

    def __repr__(self) -> str:
        return "LaunchKeys(...)"


def new_launch_keys(*, with_certificate: bool = False) -> LaunchKeys:
    """Return fresh keys for one launch."""
    public, secret = zmq.curve_keypair()
    certificate = new_certificate() if with_certificate else None
    return LaunchKeys(public.decode(), secret.decode(), secrets.token_urlsafe(32), certificate)


class SecureContext:
    """Makes ZMQ sockets that are closed to strangers; one for each process.

    Sockets belong to the thread that made them. ``socket_class``: ``zmq.asyncio.Socket`` for an
    event loop.
    """

    LINGER_MS: ClassVar[int] = 500

    def __init__(self, keys: LaunchKeys, *, peer: str | None = None) -> None:
        """``peer``: the public key of all others; the launch's own, which they share, when None."""
        self._keys = keys
        self._peer = keys.public if peer is None else peer
        self._lock = threading.Lock()
        self.zmq: zmq.Context[Any] = zmq.Context()
        self._authenticator = ThreadAuthenticator(self.zmq)
        self._authenticator.start()
        self._admitted = {self._peer.encode()}
        self._authenticator.configure_curve_callback(domain="*", credentials_provider=self)

    def admit(self, public: str) -> None:
        """Let the owner of this key pair connect too; any thread may call it."""
        self._admitted.add(public.encode())

    def callback(self, domain: str, key: bytes) -> bool:
        """Tell the authenticator whether the owner of this public key may connect."""
        # Found by a hash with a secret of this process, the time does not tell what nearly matched.
        return key in self._admitted

    def listen(
        self, kind: int, endpoint: str, *, socket_class: type | None = None
    ) -> tuple[Any, str]:
        """Bind a socket; returns it and where it can be reached.

        ``endpoint``: ``tcp://127.0.0.1:0`` picks a free port, ``ipc:///path`` a file.
        """
        socket = self._socket(kind, socket_class, endpoint)
        socket.curve_server = True
        socket.curve_secretkey = self._keys.secret.encode()
        socket.curve_publickey = self._keys.public.encode()
        # A peer that connects again under its identity takes the place of its dead connection; a
        # ROUTER would else keep that one and ignore the new.
        if kind == zmq.ROUTER:
            socket.router_handover = True
        socket.bind(endpoint)
        return socket, socket.last_endpoint.decode()

    def connect(
        self,
        kind: int,
        endpoint: str,
        *,
        identity: bytes | None = None,
        socket_class: type | None = None,
    ) -> Any:
        """Connect a socket; ZMQ connects again when the peer comes back at the same endpoint."""
        socket = self._socket(kind, socket_class, endpoint)
        socket.curve_serverkey = self._peer.encode()
        socket.curve_secretkey = self._keys.secret.encode()
        socket.curve_publickey = self._keys.public.encode()
        if identity is not None:
            socket.identity = identity
        socket.connect(endpoint)
        return socket

    def pair(self, name: str) -> tuple[Any, Any]:
        """Return two connected in-process sockets, to wake a polling thread from another one."""
        sockets = self._socket(zmq.PAIR, None), self._socket(zmq.PAIR, None)
        sockets[0].bind(f"inproc://{name}")
        sockets[1].connect(f"inproc://{name}")
        return sockets

    def close(self) -> None:
        """Close what the context still holds. Safe to call twice."""
        with self._lock:
            if not self.zmq.closed:
                self._authenticator.stop()
                self.zmq.destroy(linger=self.LINGER_MS)

    def _socket(self, kind: int, socket_class: type | None, endpoint: str = "") -> Any:
        socket = self.zmq.socket(kind, socket_class=socket_class)
        # Only then: with it, endpoints of IPv4 are told in the form of IPv6.
        socket.ipv6 = "[" in endpoint
        socket.linger = self.LINGER_MS
        socket.maxmsgsize = MAX_FRAME_BYTES
        # At a high-water mark (1000) a ROUTER drops messages silently: tokens would be lost.
        socket.sndhwm = socket.rcvhwm = 0
        return socket
