"""Hands file descriptors to ranks of the same launch on this host, over a Unix socket.

::

    reader: connect ── token ──▶ owner: uid and token right ── descriptors ──▶ reader
            └─ keeps the connection for as long as it uses them

The socket has a name that nobody can guess in the abstract namespace, and gives nothing to a
process of another user, or to one that does not know the token: both travel over the side channel,
which only ranks of the launch can use. A connection that is still open tells the owner that its
memory is still mapped, and ends with the reader's process, however that dies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from pdlaunch.errors import TransferError

logger = logging.getLogger(__name__)

TOKEN_BYTES = 32
MAX_FDS = 64
TIMEOUT_S = 5.0
"""Time for an owner to hand over its descriptors, which takes well under a millisecond unless it
was stopped.
"""

_OK = b"ok"
_CREDENTIALS = struct.Struct("iII")
_FD = struct.Struct("i")


class FdServer:
    """Hands descriptors to peers; a thread of its own answers. Any thread may call the methods."""

    def __init__(self, fds: Sequence[int]) -> None:
        """The caller keeps ``fds`` open until ``close`` has returned. Raises OSError."""
        assert len(fds) <= MAX_FDS
        self.address = f"pdlaunch-{secrets.token_hex(16)}"
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._fds: Sequence[int] | None = fds
        self._lock = threading.Lock()
        self._unused = threading.Event()
        self._unused.set()
        self._readers: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._listener = _new_socket()
        self._listener.bind(f"\0{self.address}")
        self._listener.listen()
        self._listening = True
        for opened in (self._listener, self._woken):
            opened.setblocking(False)
            self._selector.register(opened, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="fd-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop to hand descriptors over; from now on ``wait_unused`` can come true for good."""
        with self._lock:
            self._fds = None
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def wait_unused(self, timeout_s: float) -> bool:
        """Wait until nobody uses the descriptors; False when that takes longer."""
        return self._unused.wait(timeout_s)

    def _run(self) -> None:
        while self._fds is not None or self._readers:
            for key, _ in self._selector.select():
                opened = key.fileobj
                assert isinstance(opened, socket.socket)
                if opened is self._listener:
                    self._accept()
                elif opened is self._woken:
                    self._stop_listening()
                else:
                    self._receive(opened)
        self._stop_listening()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()
        self._wake.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if _uid_of(connection) != os.geteuid():
            logger.warning(
                "a process of uid %d was refused at the socket of KV memory", _uid_of(connection)
            )
            connection.close()
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: socket.socket) -> None:
        """Take the token once; after it only the end of the connection is expected."""
        try:
            message = connection.recv(TOKEN_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if connection in self._readers or not self._admit(connection, message):
            self._drop(connection)

    def _admit(self, connection: socket.socket, message: bytes) -> bool:
        if not secrets.compare_digest(message, self.token):
            if message:
                logger.warning("a process without the token was refused at the socket of KV memory")
            return False
        with self._lock:
            if self._fds is None:
                return False
            self._readers.add(connection)
            self._unused.clear()
            try:
                _send(connection, self._fds)
            except OSError as error:
                logger.warning("descriptors of KV memory were not handed over: %s", error)
                return False
        return True

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        self._readers.discard(connection)
        if not self._readers:
            self._unused.set()

    def _stop_listening(self) -> None:
        """Close the listener. Connections that have not shown the token get no answer and stay
        until the last reader has gone.
        """
        if self._listening:
            self._listening = False
            for opened in (self._listener, self._woken):
                self._selector.unregister(opened)
                opened.close()


@dataclass(frozen=True, slots=True)
class FdConnection:
    """Keeps a reader's descriptors, and the connection that tells the owner they are in use."""

    fds: list[int]
    connection: socket.socket

    def close_fds(self) -> None:
        """Close the descriptors; what is mapped stays mapped."""
        for fd in self.fds:
            os.close(fd)

    def close(self) -> None:
        """Tell the owner that nothing of its memory is in use any more."""
        self.connection.close()


def fetch_fds(
    address: str, token: bytes, num_fds: int, timeout_s: float = TIMEOUT_S
) -> FdConnection:
    """Ask an owner for its descriptors, in its order. Raises TransferError; then none is open."""
    connection = _new_socket()
    try:
        connection.settimeout(timeout_s)
        connection.connect(f"\0{address}")
        if _uid_of(connection) != os.geteuid():
            raise TransferError(f"the socket {address} belongs to uid {_uid_of(connection)}")
        connection.send(token)
        return FdConnection(_receive_fds(connection, num_fds), connection)
    except (OSError, TransferError) as error:
        connection.close()
        raise TransferError(f"no memory was handed over: {error or 'no answer'}") from error


def _receive_fds(connection: socket.socket, num_fds: int) -> list[int]:
    # ``socket.recv_fds`` drops its flags, and the descriptors would be inherited.
    ancillary_bytes = socket.CMSG_SPACE(MAX_FDS * _FD.size)
    answer, ancillary, flags, _ = connection.recvmsg(
        len(_OK), ancillary_bytes, socket.MSG_CMSG_CLOEXEC
    )
    fds = [
        fd
        for level, kind, data in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (fd,) in _FD.iter_unpack(data[: len(data) // _FD.size * _FD.size])
    ]
    if answer == _OK and len(fds) == num_fds and not flags & socket.MSG_CTRUNC:
        return fds
    for fd in fds:
        os.close(fd)
    raise TransferError(
        "refused" if not answer else f"{len(fds)} descriptors came, {num_fds} were expected"
    )


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _send(connection: socket.socket, fds: Sequence[int]) -> None:
    if fds:
        socket.send_fds(connection, [_OK], list(fds))
    else:
        connection.send(_OK)


def _uid_of(connection: socket.socket) -> int:
    """Return the user of the process at the other end, as the kernel knows it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid
