"""Copies KV blocks from a peer's memory, which is mapped into this process.

Both ranks must be on one host. On a CPU the memory is a memfd, on a GPU an allocation of CuMem or
cudaMalloc. The owner takes no part in a READ, so READs work while the owner is busy, stopped or
dead.

The owner sends file descriptors of its memory to ranks of the same launch over a Unix socket::

    reader: connect ── token ──▶ owner: uid and token right ── descriptors ──▶ reader
            └─ keeps the connection open while it maps the memory

The socket has a random name in the abstract namespace. It refuses processes of other users, and
processes without the token. Name and token are sent over the side channel, which only ranks of the
launch can use. While a connection is open, the owner knows that its memory is mapped. The kernel
closes the connection when the reader's process ends for any reason.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from pdlaunch.engine.memory.kv_memory import Export, NotShareable, PeerMapping, SharedRange
from pdlaunch.errors import TransferError
from pdlaunch.machine.host import host_identity
from pdlaunch.protocol.side_channel import HandshakeReply, RegionPlace
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    Read,
    bind_device,
    decode_metadata,
    pieces_of_scratch,
    pieces_to_read,
)
from pdlaunch.transfer.connectors.piece_copies import PieceCopier, new_copier

logger = logging.getLogger(__name__)

TOKEN_BYTES = 32
MAX_FDS = 253  # Linux's limit for one message
# Time for an owner to send its descriptors, which takes less than a millisecond unless the owner is
# stopped, and for a reader to send its token.
TIMEOUT_S = 5.0
_LONG_S = 3600.0
_OK = b"ok"
_CREDENTIALS = struct.Struct("iII")
_FD = struct.Struct("i")


class FdServer:
    """Sends descriptors to peers in its own threads. Any thread may call the methods."""

    def __init__(self, fds: Sequence[int]) -> None:
        """The caller keeps ``fds`` open until ``close`` has returned. Raises OSError."""
        if len(fds) > MAX_FDS:
            raise OSError(f"{len(fds)} allocations cannot be shared, at most {MAX_FDS} can")
        self.address = f"pdlaunch-{secrets.token_hex(16)}"
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._fds: Sequence[int] | None = fds
        self._lock = threading.Lock()  # guards the descriptors and the readers
        # Open connections of readers, by the connection's own descriptor.
        self._readers: dict[int, socket.socket] = {}
        self._listener = _new_socket()
        self._listener.bind(f"\0{self.address}")
        self._listener.listen()
        threading.Thread(target=self._accept, name="fd-server", daemon=True).start()

    def close(self) -> None:
        """Send no more descriptors, so that ``wait_unused`` can wait for the last reader."""
        with self._lock:
            self._fds = None
        with contextlib.suppress(OSError), _new_socket() as wake:
            wake.connect(f"\0{self.address}")

    def wait_unused(self, timeout_s: float) -> bool:
        """Wait until no reader uses the descriptors; False after ``timeout_s``."""
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
                # A reader sends nothing after its token, so its connection has ended.
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
                self.wait_unused(0)  # drops readers whose connections have ended
                # A thread each: a process that sends no token must not keep peers waiting.
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        while not self.wait_unused(_LONG_S):
            continue

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(TIMEOUT_S)
            _check_user(connection)
            if not secrets.compare_digest(connection.recv(TOKEN_BYTES + 1), self.token):
                raise TransferError("it sent a wrong token")
            with self._lock:
                if self._fds is None:
                    raise TransferError("the memory is not shared any more")
                socket.send_fds(connection, [_OK], list(self._fds))
                self._readers[connection.fileno()] = connection
        except (OSError, TransferError) as error:
            logger.warning("refused to send descriptors of KV memory to a process: %s", error)
            connection.close()


def fetch_fds(
    address: str, token: bytes, num_fds: int, timeout_s: float = TIMEOUT_S
) -> tuple[list[int], socket.socket]:
    """Ask an owner for its descriptors. The caller maps and may then close them, but keeps the
    socket open while it uses the memory. Raises TransferError; then nothing is open.
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
        raise TransferError(f"the owner did not share memory: {error or 'no answer'}") from error


def _receive_fds(connection: socket.socket, num_fds: int) -> list[int]:
    # Not ``socket.recv_fds``, which ignores its flags: child processes would inherit descriptors.
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
        "refused" if not answer else f"{len(fds)} descriptors arrived, {num_fds} were expected"
    )


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _check_user(connection: socket.socket) -> None:
    """Raise TransferError if the process at the other end belongs to another user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid != os.geteuid():
        raise TransferError(f"the socket's other end belongs to uid {uid}")


class _Card(msgspec.Struct, frozen=True):
    """The metadata with which peers map a rank's memory; sent over the side channel only."""

    host: str
    address: str  # of the Unix socket that sends descriptors, for ranges that need one
    token: bytes
    # The allocations of the KV cache, then the scratch, each with its address in the owner.
    ranges: list[tuple[int, SharedRange]]


class P2PConnector(Connector):
    name = "p2p"
    path = "p2p"

    def __init__(
        self,
        name: str,
        incarnation: int,
        *,
        host: str | None = None,
        new_copier: Callable[[torch.device], PieceCopier] = new_copier,
    ) -> None:
        """``name``: of the rank, ``prefill-0/rank-0``; ``host``: the identity of this host."""
        self.agent_name = f"{name}#{incarnation}"
        self._host = host_identity() if host is None else host
        self._new_copier = new_copier
        self._server: FdServer | None = None
        self._exports: list[Export] = []
        self._copier: PieceCopier | None = None

    def open(self, memory: LocalMemory) -> None:
        self._memory = memory
        bind_device(memory.scratch.device)
        shared = (*memory.kv.allocations, memory.scratch)
        try:
            for tensor in shared:
                self._exports.append(memory.source.export(tensor))
            fds = [export.fd for export in self._exports if export.fd is not None]
            self._server = FdServer(fds)
            self._copier = self._new_copier(memory.scratch.device)
        except (NotShareable, OSError, TransferError) as error:
            self.close()
            raise TransferError(f"{self.agent_name} cannot share its memory: {error}") from error
        ranges = [
            (tensor.data_ptr(), export.range)
            for tensor, export in zip(shared, self._exports, strict=True)
        ]
        card = _Card(self._host, self._server.address, self._server.token, ranges)
        self._metadata = msgspec.msgpack.encode(card)

    def agent_metadata(self) -> bytes:
        return self._metadata

    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection]:
        """Map the peer's memory. This takes about a millisecond, or up to ``TIMEOUT_S`` if the peer
        was stopped after it answered the handshake.
        """
        card = decode_metadata(peer, _Card)
        # The identity is empty if the kernel does not report it. Two such hosts may differ.
        if not self._host or card.host != self._host:
            raise TransferError(
                f"{peer.agent_name} is not on this host, or in another network namespace"
            )
        kinds = {shared.kind for _, shared in card.ranges}
        if len(kinds) != 1:
            raise TransferError(f"{peer.agent_name} shares memory of kinds {sorted(kinds)}")
        return {f"p2p/{kinds.pop()}": self._map_peer(peer, card)}

    def close(self) -> None:
        if self._server is not None:
            # The server first: it must not send descriptors that are about to be closed.
            self._server.close()
        for export in self._exports:
            export.close()
        if self._copier is not None:
            self._copier.close()
        self._exports, self._copier = [], None
        del self._memory

    def wait_unmapped(self, timeout_s: float) -> bool:
        return self._server is None or self._server.wait_unused(timeout_s)

    def _map_peer(self, peer: HandshakeReply, card: _Card) -> _P2PConnection:
        num_fds = sum(shared.needs_fd for _, shared in card.ranges)
        fds, use = fetch_fds(card.address, card.token, num_fds)
        mappings: list[PeerMapping] = []
        try:
            remaining = iter(fds)
            for _, shared in card.ranges:
                fd = next(remaining) if shared.needs_fd else None
                mappings.append(self._memory.source.map(shared, fd))
            mapped = _with_our_addresses(peer, [start for start, _ in card.ranges], mappings)
        except (NotShareable, TransferError) as error:
            for mapping in mappings:
                mapping.close()
            use.close()
            raise TransferError(
                f"the memory of {peer.agent_name} cannot be mapped: {error}"
            ) from error
        finally:
            for fd in fds:
                os.close(fd)  # mappings do not need their descriptors
        num_bytes = sum(mapping.num_bytes for mapping in mappings)
        logger.info("%s is mapped: %d bytes", peer.agent_name, num_bytes)
        assert self._copier is not None
        return _P2PConnection(mapped, self._memory, mappings, use, self._copier)


@dataclass(frozen=True, slots=True)
class _P2PConnection(Connection):
    peer: HandshakeReply  # with addresses of the mappings in this process
    memory: LocalMemory
    mappings: list[PeerMapping]
    use: socket.socket  # while it is open, the owner knows that its memory is mapped
    copier: PieceCopier

    def read(self, blocks: BlockRead) -> Read:
        return self.copier.start(*pieces_to_read(self.memory, self.peer, blocks))

    def read_scratch(self, landing: torch.Tensor, piece_bytes: int) -> Read:
        return self.copier.start(*pieces_of_scratch(landing, self.peer, piece_bytes))

    def close(self) -> None:
        for mapping in self.mappings:
            try:
                mapping.close()
            except Exception:  # the driver may raise if the peer's process is gone
                logger.exception("memory of a peer was not unmapped")
        self.use.close()


def _with_our_addresses(
    peer: HandshakeReply, starts: Sequence[int], mappings: Sequence[PeerMapping]
) -> HandshakeReply:
    """Return a peer's reply with its addresses replaced by those of the mappings in this process.
    ``starts``: the mappings' addresses in the owner. Raises TransferError for unmapped memory.
    """
    geometry = peer.geometry

    def here(what: str, address: int, num_bytes: int) -> int:
        for start, mapping in zip(starts, mappings, strict=True):
            if start <= address and address + num_bytes <= start + mapping.num_bytes:
                return address - start + mapping.address
        raise TransferError(f"{what}: the peer describes {num_bytes} bytes that it does not share")

    regions = [
        RegionPlace(
            here(
                "KV cache",
                place.address,
                (geometry.num_blocks - 1) * place.stride_bytes
                + geometry.num_kv_heads * place.head_bytes,
            ),
            place.stride_bytes,
            place.head_bytes,
        )
        for place in geometry.regions
    ]
    scratch = here("scratch", geometry.scratch_address, geometry.scratch_bytes)
    ours = msgspec.structs.replace(geometry, regions=regions, scratch_address=scratch)
    return msgspec.structs.replace(peer, geometry=ours)
