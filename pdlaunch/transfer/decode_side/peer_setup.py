"""What a peer is made of: its address, its channel, and what all peers of a rank share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pdlaunch.protocol.control import ToSupervisor
from pdlaunch.protocol.side_channel import Compatibility, ToDecodeSide, ToPrefillSide
from pdlaunch.transfer.channel.handshake import RankIdentity
from pdlaunch.transfer.channel.head_mapping import SourceRank, map_sources
from pdlaunch.transfer.connectors.connector import Connector


class Channel(Protocol):
    """The puller's end of a side channel."""

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
