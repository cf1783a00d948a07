"""Writes that readers have asked this rank for: its connector pushes, and every question gets one
answer.

A write that has begun is finished or fails by itself; whoever asked owns the destination until the
answer is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from pdlaunch.errors import LeaseError, TransferError
from pdlaunch.protocol.side_channel import Push, PushEnded, Refused, ToDecodeSide
from pdlaunch.transfer.connectors.connector import Connector, PushHandle
from pdlaunch.transfer.prefill_side.holder import Holder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Write:
    identity: bytes
    """Of the reader's socket."""
    call_id: int
    handle: PushHandle
    started_s: float


class PushDesk:
    """Takes the questions, starts the writes, brings the answers. The transfer thread owns it."""

    def __init__(self, holder: Holder, connector: Connector, clock: Callable[[], float]) -> None:
        self._holder = holder
        self._connector = connector
        self._clock = clock
        self._writes: list[_Write] = []
        self._refused: list[tuple[bytes, ToDecodeSide]] = []

    @property
    def youngest_write_s(self) -> float | None:
        """Clock time at which the last of the unfinished writes began."""
        return max((write.started_s for write in self._writes), default=None)

    def start(self, identity: bytes, message: Push) -> None:
        """Begin to write, or refuse. ``identity``: whom to answer."""
        try:
            handle = self._connector.start_push(self._holder.job_of(message))
        except (LeaseError, TransferError) as error:
            self._refused.append((identity, Refused(call_id=message.call_id, reason=str(error))))
            return
        self._writes.append(_Write(identity, message.call_id, handle, self._clock()))

    def take_answers(self) -> list[tuple[bytes, ToDecodeSide]]:
        """What has been refused or has ended since the last call; never waits."""
        answers, self._refused = self._refused, []
        pending = []
        for write in self._writes:
            error = self._connector.poll_push(write.handle)
            if error is None:
                pending.append(write)
                continue
            if error:
                logger.warning("a write to a reader failed: %s", error)
            answers.append(
                (write.identity, PushEnded(call_id=write.call_id, ok=not error, error=error))
            )
        self._writes = pending
        return answers
