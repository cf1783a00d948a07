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
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence

from pdlaunch.errors import TransferError

logger = logging.getLogger(__name__)

TOKEN_BYTES = 32
MAX_FDS = 64
# Time for an owner to hand over its descriptors, which takes well under a millisecond unless it was
# stopped, and for a reader to show its token.
TIMEOUT_S = 5.0
_LONG_S = 3600.0
_OK = b"ok"
_CREDENTIALS = struct.Struct("iII")
_FD = struct.Struct("i")


class FdServer:
    """Hands descriptors to peers from threads of its own. Any thread may call the methods."""

    def __init__(self, fds: Sequence[int]) -> None:
        """The caller keeps ``fds`` open until ``close`` has returned. Raises OSError."""
        assert len(fds) <= MAX_FDS
        self.address = f"pdlaunch-{secrets.token_hex(16)}"
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._fds: Sequence[int] | None = fds
        self._lock = threading.Lock()  # guards the descriptors and the readers
        # Connections of those that use the descriptors, by their own descriptor.
        self._readers: dict[int, socket.socket] = {}
        self._listener = _new_socket()
        self._listener.bind(f"\0{self.address}")
        self._listener.listen()
        threading.Thread(target=self._accept, name="fd-server", daemon=True).start()

    def close(self) -> None:
        """Stop to hand descriptors over; from now on ``wait_unused`` can come true for good."""
        with self._lock:
            self._fds = None
        with contextlib.suppress(OSError), _new_socket() as wake:
            wake.connect(f"\0{self.address}")

    def wait_unused(self, timeout_s: float) -> bool:
        """Wait until nobody uses the descriptors; False when that takes longer."""
        deadline_at = time.monotonic() + timeout_s
        while True:
            poll = select.poll()
            with self._lock:
                for fd in self._readers:
                    poll.register(fd, select.POLLIN)
                if not self._readers:
                    return True
            ended = poll.poll(max(0.0, deadline_at - time.monotonic()) * 1000)
            with self._lock:
                # After its token nothing but the end of a connection is expected.
                for fd, _ in ended:
                    if (reader := self._readers.pop(fd, None)) is not None:
                        reader.close()
            if not ended:
                return False

    def _accept(self) -> None:
        with self._listener:
            while True:
                connection, _ = self._listener.accept()
                if self._fds is None:
                    connection.close()
                    break
                self.wait_unused(0)  # those that have gone
                # A thread each: a stranger that says nothing must not keep peers waiting.
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        while not self.wait_unused(_LONG_S):
            continue

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(TIMEOUT_S)
            _check_user(connection)
            if not secrets.compare_digest(connection.recv(TOKEN_BYTES + 1), self.token):
                raise TransferError("without the token")
            with self._lock:
                if self._fds is None:
                    raise TransferError("too late")
                socket.send_fds(connection, [_OK], list(self._fds))
                self._readers[connection.fileno()] = connection
        except (OSError, TransferError) as error:
            logger.warning("a process was refused at the socket of KV memory: %s", error)
            connection.close()


def fetch_fds(
    address: str, token: bytes, num_fds: int, timeout_s: float = TIMEOUT_S
) -> tuple[list[int], socket.socket]:
    """Ask an owner for its descriptors, in its order; what is mapped stays mapped when they are
    closed. The socket tells the owner, as long as it is open, that they are in use.

    Raises TransferError; then nothing is open.
    """
    connection = _new_socket()
    try:
        connection.settimeout(timeout_s)
        connection.connect(f"\0{address}")
        _check_user(connection)
        connection.send(token)
        return _receive_fds(connection, num_fds), connection
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


def _check_user(connection: socket.socket) -> None:
    """Raise TransferError unless the process at the other end is of this user, by the kernel."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid != os.geteuid():
        raise TransferError(f"the socket's other end belongs to uid {uid}")
