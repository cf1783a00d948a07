"""Who waits for leases that are still to come: a decode engine may know of a prompt while prefill computes it.

::

    watch ── asked ──> lease is there: LeaseWatched(ok)
               └────── refused, or the holder cannot be reached: LeaseWatched, not ok

Nothing belongs to a watch: one that nobody is interested in any more ends by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import AwaitLease, LeaseReply, Refused, ToHolder, ToPuller
from pdlaunch.protocol.transfer import LeaseWatched, WatchLease
from pdlaunch.transfer.branch import HolderLink
from pdlaunch.transfer.peer_table import PeerTable


class LeaseWatches:
    """Asks one holder rank for each lease; a reader that comes too early to another one waits there (``early.py``)."""

    def __init__(self, peers: PeerTable, emit: Callable[[LeaseWatched], None]) -> None:
        self._peers = peers
        self._emit = emit
        self._links: dict[str, HolderLink] = {}
        """By request: who has been asked and has not answered."""

    def start(self, command: WatchLease) -> None:
        """Ask now; a holder that is not connected is not waited for."""
        request_id, remote = command.request_id, command.remote
        try:
            _, link = self._peers.sources_of(remote.engine_id)[0]
        except TransferError as error:
            self._emit(LeaseWatched(request_id=request_id, ok=False, error=str(error)))
            return
        self._links[request_id] = link
        if link.status == "ready":
            link.ask(partial(_question, remote.engine_id, remote.request_id), partial(self._on_reply, request_id))

    def advance(self) -> None:
        """Answers of a holder that is lost do not come any more."""
        for request_id, link in list(self._links.items()):
            if link.status != "ready":
                self._end(LeaseWatched(request_id=request_id, ok=False, error=f"{link.name}: {link.error or link.status}"))

    def _on_reply(self, request_id: str, reply: ToPuller) -> None:
        match reply:
            case LeaseReply(first_tokens=first_tokens):
                self._end(LeaseWatched(request_id=request_id, ok=True, first_tokens=first_tokens))
            case Refused(reason=reason):
                self._end(LeaseWatched(request_id=request_id, ok=False, error=reason))
            case _:
                self._end(LeaseWatched(request_id=request_id, ok=False, error=f"unexpected {type(reply).__name__}"))

    def _end(self, event: LeaseWatched) -> None:
        if self._links.pop(event.request_id, None) is not None:
            self._emit(event)


def _question(engine_id: str, request_id: str, call_id: int) -> ToHolder:
    return AwaitLease(call_id=call_id, engine_id=engine_id, request_id=request_id)
