"""Says what pulls and peers need of this rank and of the prefill ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pdlaunch.integrity.checksum import KVHasher
from pdlaunch.protocol.control import ToSupervisor
from pdlaunch.protocol.ids import EngineId, PullId, ReaderId
from pdlaunch.protocol.side_channel import Compatibility, Geometry, ToDecodeSide, ToPrefillSide
from pdlaunch.protocol.transfer import PullDrained, PullFinished
from pdlaunch.transfer.channel.handshake import RankIdentity
from pdlaunch.transfer.channel.head_mapping import SourceRank, map_sources
from pdlaunch.transfer.connectors.connector import BlockRead, Connector, Read

LinkStatus = Literal["connecting", "ready", "lost", "incompatible"]


class PrefillLink(Protocol):
    """What a pull needs of a holder rank."""

    name: str
    error: str
    """Why it is not ready."""

    @property
    def status(self) -> LinkStatus: ...

    @property
    def geometry(self) -> Geometry:
        """Once ready."""

    @property
    def reads_early(self) -> bool:
        """A READ needs no lease, as far as the holder is concerned."""

    def ask(
        self, build: Callable[[int], ToPrefillSide], on_reply: Callable[[ToDecodeSide], None] | None
    ) -> int:
        """Send what ``build`` makes of a fresh call_id, which is returned; ``on_reply`` gets the
        answer, if one comes.
        """

    def forget(self, call_id: int) -> None:
        """Nobody waits for this answer any more."""

    def prepare(self, blocks: BlockRead) -> None:
        """Get ready for a READ that is likely to start soon. Raises TransferError."""

    def read(self, blocks: BlockRead) -> Read:
        """Start to read. Raises TransferError."""

    def release(self, read: Read) -> None:
        """Free a READ that has ended."""

    def reconnect(self) -> None:
        """A READ has failed: the connection is not to be trusted."""


class Channel(Protocol):
    """The setup's end of a side channel."""

    socket: Any
    """For the poller."""

    @property
    def broken(self) -> bool:
        """The peer's process has ended; only known where the connector pushes."""

    def send(self, message: ToPrefillSide) -> None: ...

    def receive(self) -> list[ToDecodeSide]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """A holder rank as the registry shows it."""

    identity: RankIdentity
    endpoint: str
    """Of its side channel."""


@dataclass(frozen=True, slots=True)
class PeerSetup:
    """What all peers of this rank share."""

    identity: RankIdentity
    """Of this rank."""
    compatibility: Compatibility
    head_bytes: int
    connector: Connector
    open_channel: Callable[[str], Channel]
    """From an endpoint."""
    handshake_timeout_s: float
    clock: Callable[[], float]
    report: Callable[[ToSupervisor], None]

    def sources(self, prefill_tp_size: int) -> tuple[SourceRank, ...]:
        """The ranks of an engine that this rank pulls from. Raises HandshakeError when the TP sizes
        do not fit.
        """
        return map_sources(
            num_kv_heads=self.compatibility.num_kv_heads,
            prefill_tp_size=prefill_tp_size,
            decode_tp_size=self.identity.tp_size,
            decode_tp_rank=self.identity.tp_rank,
        )


@dataclass(frozen=True, slots=True)
class PullSetup:
    """This rank's side of all its pulls."""

    engine_id: EngineId
    tp_rank: int
    first_kv_head: int
    head_bytes: int
    hasher: KVHasher | None
    """None when ``kv_transfer.verify`` is off."""
    clock: Callable[[], float]
    emit: Callable[[PullFinished | PullDrained], None]
    alert: Callable[[int], None]
    """A pull reads so many bytes under its lease: its end is near."""

    def reader(self, pull_id: PullId) -> ReaderId:
        """Unique over engines, ranks and choices; of bounded length, whatever the request's id
        is.
        """
        digest = hashlib.sha256(pull_id.encode()).hexdigest()
        return ReaderId(f"{self.engine_id}/{self.tp_rank}/{digest}")
