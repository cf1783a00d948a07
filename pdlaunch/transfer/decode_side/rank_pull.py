"""Pulls one prefill rank's share of a prompt: what it is asked, its lease, and the proof.

::

    connecting ─ begin ─> beginning ─ lease ─> reading ─ all read ─> verifying ─ equal ─> proven
       ▲  ▲                │                      │                     │                   │
       │  └─ disconnected ─┘                      │                     │       all are ─> ended
       └──────── READ failed, or wrong bytes ─────┴─────────────────────┘
    ended, or failed here or elsewhere: the prefill rank is told as soon as it can be reached

Checksums come with a message of their own, while the blocks are read.

The lease has held throughout the READ if the READ ends before the lease can. The prefill rank says
how many seconds are left when it answers, which is after it was asked, and ends no lease earlier
while its pull is open. So it need not be asked afterwards.

Checksums prove the bytes, whatever has become of the prefill rank. Without them a READ counts only
when the prefill rank has answered a heartbeat that was sent after its end, because libraries may
call a READ from a dead process done.

A READ that failed or brought wrong bytes has ended and writes no more, so it is repeated under the
same lease into the same blocks. Other rank pulls, and other ranks, keep what they have proven.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum, auto
from functools import partial

from pdlaunch.errors import VerificationError
from pdlaunch.observe.spans import SpanLog
from pdlaunch.protocol.side_channel import (
    ChecksumsReply,
    HeartbeatReply,
    PullBegin,
    PullEnd,
    PullHeartbeat,
    PullReply,
    Refused,
    StateChecksums,
    ToDecodeSide,
)
from pdlaunch.protocol.transfer import StartPull
from pdlaunch.transfer.channel.head_mapping import SourceRank
from pdlaunch.transfer.decode_side.lease_hold import LeaseHold
from pdlaunch.transfer.decode_side.links import PrefillLink, PullSetup
from pdlaunch.transfer.decode_side.reads import PullFailed, ReadFailed, Share, ShareRead
from pdlaunch.transfer.instants import earliest, is_due

logger = logging.getLogger(__name__)

REPEAT_S = 5.0
"""A question without an answer is asked again after this time: a connection between two hosts may
break unnoticed.
"""


class Stage(Enum):
    CONNECTING = auto()
    BEGINNING = auto()
    READING = auto()
    VERIFYING = auto()
    PROVEN = auto()
    ENDED = auto()


class RankPull:
    """Talks to one prefill rank and reads from it. That rank learns of the end, however the pull
    ends.
    """

    def __init__(
        self,
        command: StartPull,
        source: SourceRank,
        link: PrefillLink,
        setup: PullSetup,
        log: SpanLog | None = None,
    ) -> None:
        """``log`` takes what is done, where somebody wants to see it."""
        self.name = link.name
        self.stage = Stage.CONNECTING
        self.num_retries = 0
        self.verification_failed = False
        self._had_lease = False
        self._command = command
        self._source = source
        self._link = link
        self._setup = setup
        self._log = log
        self._reader = setup.reader(command.pull_id)
        self._reads = ShareRead(
            command,
            link,
            setup,
            Share(link.name, self._reader, source.heads, setup.first_kv_head),
            log,
        )
        self._begin_calls: list[int] = []
        """Calls of PullBegin without an answer."""
        self._next_begin_at: float | None = None
        """The instant at which PullBegin is sent again, while no lease is known."""
        self._next_checksums_at: float | None = None
        """The instant at which the checksums are asked for, while they are missing."""
        self._hold = LeaseHold(setup.clock)
        self._failure: PullFailed | None = None
        """Failure that an answer brought; only ``advance`` raises."""
        self._given_up = False
        self._owes_until_at: float | None = None
        """Deadline for reporting the end to the prefill rank; None before the end, and once
        reported.
        """

    @property
    def path(self) -> str:
        return self._link.path

    @property
    def num_bytes(self) -> int:
        return self._reads.num_bytes

    @property
    def read_s(self) -> float:
        """Return how long its READs took, as exactly as the connector knows."""
        return self._reads.read_s

    @property
    def is_proven(self) -> bool:
        """Return whether the blocks are here and right."""
        return self.stage in (Stage.PROVEN, Stage.ENDED)

    @property
    def in_flight(self) -> bool:
        """Return whether a READ may still write to the blocks."""
        return self._reads.in_flight

    @property
    def hashing_since_at(self) -> float | None:
        """Return when the checksums that are being computed were asked for."""
        return self._reads.ended_at if self.stage is Stage.VERIFYING else None

    @property
    def owes_end(self) -> bool:
        """Return whether it is over, and the prefill rank has not been told."""
        return self._owes_until_at is not None

    def next_deadline_at(self) -> float | None:
        """Return when there is something to do, READs and messages aside."""
        if self._owes_until_at is not None:
            return self._owes_until_at
        if self._given_up or self._link.status != "ready":
            return None
        return earliest(
            (self._hold.next_heartbeat_at, self._next_begin_at, self._next_checksums_at)
        )

    def advance(self) -> None:
        """Do what can be done now; never waits. Raises PullFailed."""
        # Answers come while peers are advanced; a failure that they bring is raised here.
        if self._failure is not None:
            raise self._failure.without_traceback()
        if self.stage is Stage.ENDED:
            return
        if self._link.status in ("lost", "incompatible"):
            raise PullFailed(f"{self.name}: {self._link.error}")
        # Before anything is asked: when a READ has failed, its connection is given up, and the next
        # question is another one.
        try:
            self._read()
        except ReadFailed as failure:
            if not self._try_again(failure):
                raise
        if self._link.status == "ready":
            self._ask()
        else:
            self._on_disconnected()

    def end(self) -> None:
        """End a pull whose rank pulls are all proven; see ``give_up``."""
        self.stage = Stage.ENDED
        self.give_up()

    def give_up(self) -> None:
        """End the pull: the prefill rank need not wait for this reader any more. Then call
        ``settle`` until nothing is left.

        The blocks may belong to somebody else from now on, unless a READ is in flight; no other
        begins.
        """
        self._given_up = True
        self._forget_begin_calls()
        if self._link.status != "ready":
            self._on_disconnected()
        self._owes_until_at = self._setup.clock() + self._command.timeout_s
        self.settle()

    def settle(self) -> None:
        """Tell the prefill rank of the end once it can be reached, and release the READ once that
        has ended.
        """
        if self._owes_until_at is not None:
            self._settle_end(self._owes_until_at)
        self._reads.settle()

    def _settle_end(self, owes_until_at: float) -> None:
        status = self._link.status
        if status == "ready":
            if self.stage is Stage.CONNECTING:
                # A reader's share of the lease ends only when it has begun.
                self._link.ask(self._begin_message, None)
            # Not by a notification of NIXL's, which is sent for whatever was read: of a READ that
            # was given up, and of memory that was deregistered.
            self._ask_about(PullEnd, None)
        # Lost or incompatible: nobody is left to be told. Connecting: try until the deadline.
        if status != "connecting" or self._setup.clock() >= owes_until_at:
            self._owes_until_at = None

    def _on_disconnected(self) -> None:
        """Stop waiting for answers, which do not come any more."""
        if self.stage is Stage.BEGINNING:
            self.stage, self._next_begin_at = Stage.CONNECTING, None
        # A heartbeat, or its answer, may have been lost with the connection.
        if self.stage is not Stage.CONNECTING:
            self._hold.ask_now()
        if self._next_checksums_at is not None:
            self._next_checksums_at = self._setup.clock()

    def _ask(self) -> None:
        """Ask what is to be asked now."""
        now = self._setup.clock()
        if self.stage is Stage.CONNECTING or is_due(self._next_begin_at, now):
            self._begin()
        if is_due(self._next_checksums_at, now):
            self._ask_for_checksums()
        if is_due(self._hold.next_heartbeat_at, now):
            self._heartbeat()

    def _begin(self) -> None:
        now = self._setup.clock()
        self.stage, self._next_begin_at = Stage.BEGINNING, now + REPEAT_S
        self._begin_calls.append(self._link.ask(self._begin_message, partial(self._on_reply, now)))

    def _forget_begin_calls(self) -> None:
        """Drop the answers to repetitions of the same question: one is enough."""
        while self._begin_calls:
            self._link.forget(self._begin_calls.pop())

    def _ask_for_checksums(self) -> None:
        self._next_checksums_at = self._setup.clock() + REPEAT_S
        self._ask_about(StateChecksums, partial(self._on_reply, 0.0))

    def _heartbeat(self) -> None:
        now = self._setup.clock()
        self._hold.sent(now)
        self._ask_about(PullHeartbeat, partial(self._on_reply, now))

    def _ask_about(
        self,
        kind: type[StateChecksums | PullHeartbeat | PullEnd],
        on_reply: Callable[[ToDecodeSide], None] | None,
    ) -> None:
        """Send a message about a pull that has begun."""
        remote, reader = self._command.remote, self._reader
        self._link.ask(
            lambda call_id: kind(
                call_id=call_id,
                engine_id=remote.engine_id,
                lease_id=remote.lease_id,
                reader=reader,
            ),
            on_reply,
        )

    def _begin_message(self, call_id: int) -> PullBegin:
        remote = self._command.remote
        return PullBegin(
            call_id=call_id,
            engine_id=remote.engine_id,
            lease_id=remote.lease_id,
            reader=self._reader,
            num_decode_ranks=self._source.num_decode_ranks,
        )

    def _on_reply(self, asked_at: float, reply: ToDecodeSide) -> None:
        """Handle an answer to a question that was sent at ``asked_at``. From then on the lease
        holds for at least the seconds that the answer states.
        """
        if self._given_up or self._failure is not None:
            return
        try:
            self._handle_reply(asked_at, reply)
        except ReadFailed as failure:
            if not self._try_again(failure):
                self._failure = failure.without_traceback()
        except PullFailed as failure:
            self._failure = failure.without_traceback()

    def _handle_reply(self, asked_at: float, reply: ToDecodeSide) -> None:
        match reply:
            case PullReply() if self.stage is Stage.BEGINNING:
                self._forget_begin_calls()
                self._take_lease(asked_at, reply)
            case PullReply():
                return  # To a PullBegin that was repeated.
            case ChecksumsReply():
                if self._reads.lacks_checksums:
                    self._reads.state(reply.groups)
                    self._next_checksums_at = None
                    self._read()
            case HeartbeatReply():
                self._hold.answered(asked_at)
                if self.stage in (Stage.READING, Stage.VERIFYING, Stage.PROVEN):
                    self._hold.extend(asked_at, reply.lease_s)
            case Refused():
                # Once there was a lease a refusal says that it has ended: what was read since may
                # be another request's, which is counted as late.
                raise PullFailed(f"{self.name} refused: {reply.reason}", late=self._had_lease)
            case _:
                raise PullFailed(f"{self.name}: unexpected {type(reply).__name__}")

    def _take_lease(self, asked_at: float, reply: PullReply) -> None:
        """Begin to read under the lease before anything else. The seconds that the answer states
        count from the question: nobody here knows when the answer left.
        """
        self.stage, self._next_begin_at, self._had_lease = Stage.READING, None, True
        logger.debug("%s: lease at %s for %g s", self._command.request_id, self.name, reply.lease_s)
        self._hold.begin(asked_at, reply.lease_s)
        # The READ takes longest: it begins before other questions.
        self._reads.begin(reply)
        if self._reads.lacks_checksums:
            self._next_checksums_at = self._setup.clock()
        self._ask()
        self._read()

    def _read(self) -> None:
        """Begin and end READs, and prove what they have brought. Raises ReadFailed, PullFailed."""
        self._reads.advance()
        if self.stage is Stage.READING and self._reads.is_complete:
            self.stage = Stage.VERIFYING
        if self.stage is Stage.VERIFYING and self._has_held():
            self._verify()

    def _has_held(self) -> bool:
        """Return whether the lease is known to have held throughout the READ. Raises PullFailed
        when it has not.
        """
        # Without checksums a READ counts once a heartbeat is answered that was sent after its end.
        ended_at = self._reads.ended_at
        if self._setup.hasher is None and not self._hold.is_confirmed_after(ended_at):
            return False
        if self._hold.held_at(ended_at):
            return True
        raise PullFailed(f"{self.name}: the lease did not hold throughout the READ", late=True)

    def _verify(self) -> None:
        try:
            if self._reads.is_proven():
                self.stage = Stage.PROVEN
                self._note_checksums(ok=True)
        except VerificationError as error:
            self.verification_failed = True
            self._note_checksums(ok=False)
            logger.error("pull of %s from %s: %s", self._command.request_id, self.name, error)
            raise ReadFailed(f"{self.name}: {error}", verification=True) from error

    def _note_checksums(self, *, ok: bool) -> None:
        if self._log is not None and self._setup.hasher is not None:
            self._log.add("checksums", self._reads.ended_at, None, source=self.name, ok=ok)

    def _try_again(self, failure: ReadFailed) -> bool:
        """Begin anew, as the READ is over and writes no more. Returns False when no attempt is
        left.
        """
        if self.num_retries + 1 >= self._command.num_attempts:
            return False
        self.num_retries += 1
        logger.warning("pull of %s begins anew: %s", self._command.request_id, failure)
        self.stage = Stage.CONNECTING
        self._next_begin_at = self._next_checksums_at = None
        self._hold.stop()
        return True
