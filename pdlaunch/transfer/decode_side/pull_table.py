"""All pulls of this rank that have not closed."""

from __future__ import annotations

from pdlaunch.errors import TransferError
from pdlaunch.protocol.ids import PullId
from pdlaunch.protocol.transfer import CancelPull, PullFinished, StartPull
from pdlaunch.transfer.decode_side.holder_link import Puller
from pdlaunch.transfer.decode_side.peer_table import PeerTable
from pdlaunch.transfer.decode_side.pull import Pull


class PullTable:
    """Starts, drives and cancels pulls."""

    def __init__(self, puller: Puller, peers: PeerTable) -> None:
        self._puller = puller
        self._peers = peers
        self._pulls: dict[PullId, Pull] = {}

    def __len__(self) -> int:
        return len(self._pulls)

    @property
    def hold_blocks(self) -> bool:
        """Blocks of this rank belong to a pull; else some only have to tell holders of their
        end.
        """
        return any(pull.holds_blocks for pull in self._pulls.values())

    @property
    def youngest_hashing_s(self) -> float | None:
        """Clock time at which checksums were asked for, latest, that are still being computed;
        None: none are.
        """
        since_s = [pull.youngest_hashing_s for pull in self._pulls.values()]
        return max((at_s for at_s in since_s if at_s is not None), default=None)

    def start(self, command: StartPull) -> None:
        """Begin a pull. The holder is found in the registry by its engine_id: the request's host
        and port are not trusted.
        """
        assert command.pull_id not in self._pulls
        try:
            links = self._peers.sources_of(command.remote.engine_id)
        except TransferError as error:
            self._puller.emit(PullFinished(pull_id=command.pull_id, ok=False, error=str(error)))
            return
        self._pulls[command.pull_id] = Pull(command, list(links), self._puller)

    def cancel(self, command: CancelPull) -> None:
        """Unknown pulls have ended already."""
        if (pull := self._pulls.get(command.pull_id)) is not None:
            pull.cancel()

    def advance(self) -> None:
        """Let every pull do what can be done now."""
        for pull in list(self._pulls.values()):
            pull.advance()
            if pull.closed:
                del self._pulls[pull.command.pull_id]

    def next_deadline_s(self) -> float:
        """Clock time at which ``advance`` has something to do, READs and messages aside."""
        return min((pull.next_deadline_s() for pull in self._pulls.values()), default=float("inf"))
