"""Carries the sums of a TP group whose ranks are on several hosts, over CURVE.

Gloo listens for anybody while a group forms and has no keys, which is well on a loopback device
alone. Here every rank but rank 0 sends what it has and waits; rank 0 puts all in the order of the
ranks, so that sums are the same in each run, and sends the result back. What one frame cannot hold
travels as several of one message::

    follower ── head, piece, piece .. ──▶ rank 0 ── piece, piece .. ──▶ every follower
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence

import zmq

from pdlaunch.errors import StartupError, TransferError
from pdlaunch.machine.addresses import tcp_endpoint
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.protocol.wire import MAX_FRAME_BYTES

TIMEOUT_S = 300.0
MAX_DATA_BYTES = 4 * 1024**3
"""Limits what one rank has: a sum of 100,000 tokens with 8,192 float32 values each has 3.3 GB."""
_PIECE_BYTES = MAX_FRAME_BYTES // 2
_HEAD = struct.Struct("<IQ")
"""The rank, and the number of the call: ranks make the same calls in the same order."""

Merge = Callable[[Sequence[bytes]], bytes]


class LeaderExchange:
    """Is rank 0's end; ``endpoint`` is what the other ranks are told."""

    def __init__(
        self,
        context: SecureContext,
        bind_address: str,
        advertise_address: str,
        tp_size: int,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._socket, bound = context.listen(zmq.ROUTER, tcp_endpoint(bind_address, 0))
        self.endpoint = tcp_endpoint(advertise_address, int(bound.rpartition(":")[2]))
        self._tp_size = tp_size
        self._timeout_s = timeout_s
        self._num_calls = 0
        self._early: dict[tuple[int, int], tuple[bytes, bytes]] = {}
        """Messages that ranks have sent already, by call and rank, with their identity."""

    def combine(self, data: bytes, merge: Merge) -> bytes:
        """Return ``merge`` of what all ranks have, in their order. Raises TransferError."""
        self._num_calls += 1
        call, others = self._num_calls, range(1, self._tp_size)
        ends_at = time.monotonic() + self._timeout_s
        while missing := [rank for rank in others if (call, rank) not in self._early]:
            left_s = ends_at - time.monotonic()
            if left_s <= 0 or not self._socket.poll(max(1, int(left_s * 1000))):
                raise TransferError(
                    f"ranks {missing} of the TP group were silent for {self._timeout_s:g} s"
                )
            identity, head, *pieces = self._socket.recv_multipart()
            rank, number = _HEAD.unpack(head)
            # A rank that is done with a call goes on to the next before this one has heard of all
            # others.
            self._early[number, rank] = (identity, _join(pieces))
        theirs = [self._early.pop((call, rank)) for rank in others]
        merged = merge([data, *(payload for _, payload in theirs)])
        for identity, _ in theirs:
            self._socket.send_multipart([identity, *_cut(merged)])
        return merged

    def close(self) -> None:
        self._socket.close()


class FollowerExchange:
    """Is the end of any other rank; ``endpoint`` is rank 0's."""

    def __init__(
        self,
        context: SecureContext,
        endpoint: str,
        tp_rank: int,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._socket = context.connect(zmq.DEALER, endpoint)
        self._tp_rank = tp_rank
        self._timeout_s = timeout_s
        self._num_calls = 0

    def combine(self, data: bytes, merge: Merge) -> bytes:
        """Return what rank 0 has merged; ``merge`` is rank 0's business. Raises TransferError."""
        self._num_calls += 1
        self._socket.send_multipart([_HEAD.pack(self._tp_rank, self._num_calls), *_cut(data)])
        if not self._socket.poll(int(self._timeout_s * 1000)):
            raise TransferError(f"rank 0 of the TP group was silent for {self._timeout_s:g} s")
        return _join(self._socket.recv_multipart())

    def close(self) -> None:
        self._socket.close()


def _cut(data: bytes) -> list[memoryview]:
    """Return the frames that carry ``data``, one at least. Raises TransferError for too much."""
    if len(data) > MAX_DATA_BYTES:
        raise TransferError(
            f"a TP group over several hosts adds up at most {MAX_DATA_BYTES} bytes at once, not "
            f"{len(data)}: set a smaller max_num_batched_tokens"
        )
    view = memoryview(data)
    return [view[at : at + _PIECE_BYTES] for at in range(0, max(1, len(data)), _PIECE_BYTES)]


def _join(pieces: list[bytes]) -> bytes:
    """Return what ``_cut`` has made these frames of. Raises TransferError for other ones."""
    if not pieces or sum(map(len, pieces)) > MAX_DATA_BYTES:
        raise TransferError(f"{len(pieces)} frames came from a rank of the TP group: no such sum")
    return b"".join(pieces)


def require_cpu(device: str) -> None:
    """Raise StartupError for a device whose group cannot be closed to strangers."""
    if device != "cpu":
        raise StartupError(
            f"ranks of one engine on several hosts compute on CPUs alone, and this one is on "
            f"{device}: NCCL's connections have no keys"
        )
