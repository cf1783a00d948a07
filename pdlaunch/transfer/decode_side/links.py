"""Says what pulls and peers need of this rank and of the prefill ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pdlaunch.protocol.control import ToSupervisor
from pdlaunch.protocol.ids import EngineId, PullId, ReaderId
from pdlaunch.protocol.side_channel import Compatibility, Geometry, ToDecodeSide, ToPrefillSide
from pdlaunch.protocol.transfer import PullDrained, PullFinished
from pdlaunch.transfer.channel.handshake import RankIdentity
from pdlaunch.transfer.channel.head_mapping import SourceRank, map_sources
from pdlaunch.transfer.connectors.connector import BlockRead, Connector, Read
from pdlaunch.transfer.integrity.checksum import KVHasher

LinkStatus = Literal["connecting", "ready", "lost", "incompatible"]


class PrefillLink(Protocol):
    """Gives a pull what it needs of one prefill rank."""

    name: str
    path: str
    """The path that it is read over; empty before the first handshake."""
    error: str
    """The reason why it is not ready."""

    @property
    def status(self) -> LinkStatus: ...

    @property
    def geometry(self) -> Geometry:
        """Return how its blocks lie; only of a link that is ready."""

    def ask(
        self, build: Callable[[int], ToPrefillSide], on_reply: Callable[[ToDecodeSide], None] | None
    ) -> int:
        """Send the question that ``build`` makes of a fresh call_id, and return that. ``on_reply``
        gets the answer, if one comes.
        """

    def forget(self, call_id: int) -> None:
        """Drop the answer to this call: nobody waits for it any more."""

    def read(self, blocks: BlockRead) -> Read:
        """Start to read. Raises TransferError."""

    def release(self, read: Read) -> None:
        """Free a READ that has ended."""

    def reconnect(self) -> None:
        """Make a new connection, because a READ over this one has failed."""


class Channel(Protocol):
    """Stands for the decode side's end of a side channel."""

    socket: Any
    """Registered with the thread's poller."""

    @property
    def broken(self) -> bool:
        """Return whether the peer's process has ended; only known where the connector pushes."""

    def send(self, message: ToPrefillSide) -> None: ...

    def receive(self) -> list[ToDecodeSide]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Describes a prefill rank as the registry shows it."""

    identity: RankIdentity
    endpoint: str
    """Endpoint of its side channel."""


@dataclass(frozen=True, slots=True)
class PeerSetup:
    """Holds what all peers of this rank share."""

    identity: RankIdentity
    """This rank."""
    compatibility: Compatibility
    head_bytes: int
    connector: Connector
    open_channel: Callable[[str], Channel]
    """Opens a channel to an endpoint."""
    handshake_timeout_s: float
    clock: Callable[[], float]
    report: Callable[[ToSupervisor], None]

    def sources(self, prefill_tp_size: int) -> tuple[SourceRank, ...]:
        """Return the ranks of an engine that this rank pulls from. Raises HandshakeError when the
        TP sizes do not fit.
        """
        return map_sources(
            num_kv_heads=self.compatibility.num_kv_heads,
            prefill_tp_size=prefill_tp_size,
            decode_tp_size=self.identity.tp_size,
            decode_tp_rank=self.identity.tp_rank,
        )


@dataclass(frozen=True, slots=True)
class PullSetup:
    """Holds what all pulls of this rank share."""

    engine_id: EngineId
    tp_rank: int
    first_kv_head: int
    head_bytes: int
    hasher: KVHasher | None
    """None when ``kv_transfer.verify`` is off."""
    clock: Callable[[], float]
    emit: Callable[[PullFinished | PullDrained], None]

    def reader(self, pull_id: PullId) -> ReaderId:
        """Return the reader's name, unique over engines, ranks and choices. Its length is bounded,
        however long the request's id is.
        """
        digest = hashlib.sha256(pull_id.encode()).hexdigest()
        return ReaderId(f"{self.engine_id}/{self.tp_rank}/{digest}")
