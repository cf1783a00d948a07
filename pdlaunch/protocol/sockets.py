"""Makes ZMQ sockets that only processes of the same launch can use.

Every socket uses CURVE with the launch's key pair. An authenticator admits only this key, since
CURVE without an allow-list admits any key.
"""

import secrets
import threading
from typing import Any, ClassVar

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from pdlaunch.protocol.certificates import new_certificate
from pdlaunch.protocol.wire import MAX_FRAME_BYTES


class LaunchKeys(msgspec.Struct, frozen=True):
    """The secrets of a launch: a CURVE key pair (Z85), a token for HTTP, perhaps a certificate."""

    public: str
    secret: str
    http_token: str
    certificate: str | None = None

    def __repr__(self) -> str:
        return "LaunchKeys(...)"


def new_launch_keys(*, with_certificate: bool = False) -> LaunchKeys:
    """Return new keys for one launch."""
    public, secret = zmq.curve_keypair()
    certificate = new_certificate() if with_certificate else None
    return LaunchKeys(public.decode(), secret.decode(), secrets.token_urlsafe(32), certificate)


class SecureContext:
    """Makes ZMQ sockets that refuse strangers. A socket belongs to the thread that made it."""

    LINGER_MS: ClassVar[int] = 500

    def __init__(self, keys: LaunchKeys, *, peer: str | None = None) -> None:
        """``peer``: the public key of all peers; None: the launch's own, which all share."""
        self._keys = keys
        self._peer = keys.public if peer is None else peer
        self._lock = threading.Lock()
        self.zmq: zmq.Context[Any] = zmq.Context()
        self._authenticator = ThreadAuthenticator(self.zmq)
        self._authenticator.start()
        self._admitted = {self._peer.encode()}
        self._authenticator.configure_curve_callback(domain="*", credentials_provider=self)

    def admit(self, public: str) -> None:
        """Admit the owner of this public key too; any thread may call this."""
        self._admitted.add(public.encode())

    def callback(self, domain: str, key: bytes) -> bool:
        """Return to the authenticator whether the owner of this public key may connect."""
        # A set compares hashes with a secret of this process, so the time reveals no admitted key.
        return key in self._admitted

    def listen(
        self, kind: int, endpoint: str, *, socket_class: type | None = None
    ) -> tuple[Any, str]:
        """Bind a socket at ``tcp://127.0.0.1:0`` (a free port) or ``ipc:///path``; return both."""
        socket = self._socket(kind, socket_class, endpoint)
        socket.curve_server = True
        socket.curve_secretkey = self._keys.secret.encode()
        socket.curve_publickey = self._keys.public.encode()
        # A peer that reconnects with its identity replaces its dead connection. Otherwise a ROUTER
        # keeps the old connection and ignores the new one.
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
        """Connect a socket; ZMQ reconnects when the peer comes back at the same endpoint."""
        socket = self._socket(kind, socket_class, endpoint)
        socket.curve_serverkey = self._peer.encode()
        socket.curve_secretkey = self._keys.secret.encode()
        socket.curve_publickey = self._keys.public.encode()
        if identity is not None:
            socket.identity = identity
        socket.connect(endpoint)
        return socket

    def pair(self, name: str) -> tuple[Any, Any]:
        """Return two connected in-process sockets, by which a thread can wake a polling one."""
        sockets = self._socket(zmq.PAIR, None), self._socket(zmq.PAIR, None)
        sockets[0].bind(f"inproc://{name}")
        sockets[1].connect(f"inproc://{name}")
        return sockets

    def close(self) -> None:
        """Close all open sockets and the context. Safe to call twice."""
        with self._lock:
            if not self.zmq.closed:
                self._authenticator.stop()
                self.zmq.destroy(linger=self.LINGER_MS)

    def _socket(self, kind: int, socket_class: type | None, endpoint: str = "") -> Any:
        socket = self.zmq.socket(kind, socket_class=socket_class)
        # Only for IPv6: with this option, ZMQ reports IPv4 endpoints in the form of IPv6.
        socket.ipv6 = "[" in endpoint
        socket.linger = self.LINGER_MS
        socket.maxmsgsize = MAX_FRAME_BYTES
        # No high-water mark: at the default of 1000, a ROUTER silently drops messages with tokens.
        socket.sndhwm = socket.rcvhwm = 0
        return socket
