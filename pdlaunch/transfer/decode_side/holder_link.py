"""What pulls need of this rank and of the ranks that hold blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from pdlaunch.integrity.checksum import KVHasher
from pdlaunch.protocol.ids import EngineId, PullId, ReaderId
from pdlaunch.protocol.side_channel import Geometry, ToDecodeSide, ToPrefillSide
from pdlaunch.protocol.transfer import PullDrained, PullFinished
from pdlaunch.transfer.connectors.connector import BlockRead, Read

LinkStatus = Literal["connecting", "ready", "lost", "incompatible"]


class HolderLink(Protocol):
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


@dataclass(frozen=True, slots=True)
class Puller:
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
