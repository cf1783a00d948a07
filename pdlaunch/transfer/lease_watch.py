"""Who waits for leases that are still to come: a decode engine may know of a prompt while prefill computes it.

::

    watch ── asked ──> lease is there: LeaseWatched(ok)
               └────── refused, given up, or the holder cannot be reached: LeaseWatched, not ok

Nothing belongs to a watch. An answer may be lost with a connection
between two hosts, which nobody notices, so the question is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import AwaitLease, LeaseReply, Refused, ToHolder, ToPuller
from pdlaunch.protocol.transfer import LeaseWatched, UnwatchLease, WatchLease
from pdlaunch.transfer.branch import REPEAT_S, HolderLink
from pdlaunch.transfer.peer_table import PeerTable


@dataclass(slots=True, eq=False)
class _Watch:
    """Who has been asked and has not answered."""

    command: WatchLease
    link: HolderLink
    repeat_s: float
    """Clock time of the next question."""


class LeaseWatches:
    """Asks one holder rank for each lease; a reader that comes too early to another one waits there (``early.py``)."""

    def __init__(self, peers: PeerTable, emit: Callable[[LeaseWatched], None], clock: Callable[[], float]) -> None:
        self._peers = peers
        self._emit = emit
        self._clock = clock
        self._watches: dict[str, _Watch] = {}
        """By request."""

    def start(self, command: WatchLease) -> None:
        """Ask now; a holder that is not connected is not waited for."""
        request_id, remote = command.request_id, command.remote
        try:
            _, link = self._peers.sources_of(remote.engine_id)[0]
        except TransferError as error:
            self._emit(LeaseWatched(request_id=request_id, ok=False, error=str(error)))
            return
        self._watches[request_id] = _Watch(command, link, self._clock())
        self.advance()

    def cancel(self, command: UnwatchLease) -> None:
        """Ask no more. Unknown watches have ended already."""
        self._end(LeaseWatched(request_id=command.request_id, ok=False, error="given up"))

    def advance(self) -> None:
        """Ask what is to be asked; answers of a holder that is lost do not come any more."""
        now_s = self._clock()
        for request_id, watch in list(self._watches.items()):
            link = watch.link
            if link.status != "ready":
                self._end(LeaseWatched(request_id=request_id, ok=False, error=f"{link.name}: {link.error or link.status}"))
            elif now_s >= watch.repeat_s:
                watch.repeat_s = now_s + REPEAT_S
                remote = watch.command.remote
                link.ask(partial(_question, remote.engine_id, remote.request_id), partial(self._on_reply, watch))

    def next_deadline_s(self) -> float:
        """Clock time at which ``advance`` has something to ask."""
        return min((watch.repeat_s for watch in self._watches.values()), default=float("inf"))

    def _on_reply(self, watch: _Watch, reply: ToPuller) -> None:
        request_id = watch.command.request_id
        if self._watches.get(request_id) is not watch:
            return
        match reply:
            case LeaseReply(first_tokens=first_tokens):
                self._end(LeaseWatched(request_id=request_id, ok=True, first_tokens=first_tokens))
            case Refused(reason=reason):
                self._end(LeaseWatched(request_id=request_id, ok=False, error=reason))
            case _:
                self._end(LeaseWatched(request_id=request_id, ok=False, error=f"unexpected {type(reply).__name__}"))

    def _end(self, event: LeaseWatched) -> None:
        if self._watches.pop(event.request_id, None) is not None:
            self._emit(event)


def _question(engine_id: str, request_id: str, call_id: int) -> ToHolder:
    return AwaitLease(call_id=call_id, engine_id=engine_id, request_id=request_id)
