"""Pulls the blocks of prompts, each from one or more prefill ranks into blocks of this rank.

The stages of one prefill rank's share::

    connecting ─ begin ─> beginning ─ lease ─> reading ─ all read ─> verifying ─ equal ─> proven
       ▲  ▲                   │                  │                       │                  │
       │  └── disconnected ───┘                  │                       │      all are ─> ended
       └───────── READ failed, or wrong bytes ───┴───────────────────────┘
    ended, or failed here or elsewhere: the prefill rank is told as soon as it can be reached

The lease has held throughout the READ if the READ ends before the lease can. The prefill rank says
how many seconds are left when it answers, which is after it was asked, and ends no lease earlier
while its pull is open. So the decode rank need not ask afterwards.

Checksums prove the bytes even if the prefill rank has died. Without them a READ counts only
when the prefill rank has answered a heartbeat that was sent after its end, because libraries may
call a READ from a dead process done.

A READ that failed or brought wrong bytes has ended and writes no more, so it is repeated under the
same lease into the same blocks; other shares keep what they have proven. A READ that is pending
when its pull fails still owns its destination blocks: the pull says ``in_flight``, and lives until
the READ has ended, however long that takes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from enum import Enum, auto
from functools import partial

from pdlaunch.errors import TransferError, VerificationError
from pdlaunch.observe.spans import SpanLog
from pdlaunch.protocol.ids import PullId, ReaderId
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
from pdlaunch.protocol.transfer import (
    CancelPull,
    PullDrained,
    PullFinished,
    StartPull,
    join_paths,
)
from pdlaunch.transfer.handshake import DecodeSetup, SourceRank
from pdlaunch.transfer.peers import Peer, PeerTable
from pdlaunch.transfer.reads import PullFailed, ReadFailed, ShareRead

logger = logging.getLogger(__name__)

REPEAT_S = 5.0
"""A question without an answer is asked again after this time: a connection between two hosts may
break unnoticed.
"""
HEARTBEATS_A_LEASE = 4


class Stage(Enum):
    CONNECTING = auto()
    BEGINNING = auto()
    READING = auto()
    VERIFYING = auto()
    PROVEN = auto()
    ENDED = auto()


class SharePull:
    """Pulls one prefill rank's share of a prompt; always tells that rank of the end."""

    def __init__(
        self, command: StartPull, source: SourceRank, peer: Peer, setup: DecodeSetup, log: SpanLog
    ) -> None:
        self.name = peer.name
        self.peer = peer
        self.stage = Stage.CONNECTING
        self.num_retries = 0
        self.verification_failed = False
        self.gives_up_telling_at: float | None = None
        """Deadline for telling the prefill rank of the end; None before the end, and once it is
        told.
        """
        self._command = command
        self._num_decode_ranks = source.num_decode_ranks
        self._setup = setup
        self._log = log
        # Unique over engines, ranks and choices; of bounded length, however long the id is.
        digest = hashlib.sha256(command.pull_id.encode()).hexdigest()
        identity = setup.identity
        self._reader = ReaderId(f"{identity.engine_id}/{identity.tp_rank}/{digest}")
        self.read = ShareRead(command, peer, setup, self._reader, source.heads, log)
        self._begin_calls: list[int] = []
        """Calls of PullBegin without an answer."""
        self._next_begin_at: float | None = None
        """The instant at which PullBegin is sent again, while no lease is known."""
        self._next_checksums_at: float | None = None
        """The instant at which the checksums are asked for, while they are missing."""
        self._next_heartbeat_at: float | None = None
        self._heartbeat_s = 0.0
        self._held_until_at: float | None = None
        """Instant until which the lease is known to hold; None before there was one."""
        self._heartbeat_sent_at = self._heartbeat_answered_at = 0.0
        """Instants at which the last heartbeat, and the last one that was answered, were sent."""
        self._failure: PullFailed | None = None
        """The failure in an answer; only ``advance`` raises it."""
        self._given_up = False

    @property
    def is_proven(self) -> bool:
        """Return whether the blocks have arrived and are proven."""
        return self.stage in (Stage.PROVEN, Stage.ENDED)

    def next_deadline_at(self) -> float | None:
        """Return when there is something to do, READs and messages aside."""
        if self.gives_up_telling_at is not None:
            return self.gives_up_telling_at
        if self._given_up or self.peer.state != "ready":
            return None
        due_at = self._next_heartbeat_at, self._next_begin_at, self._next_checksums_at
        return min((at for at in due_at if at is not None), default=None)

    def advance(self) -> None:
        """Do what can be done now; never waits. Raises PullFailed."""
        # Answers come while peers are advanced; their failures are raised here.
        if self._failure is not None:
            raise self._failure.without_traceback()
        if self.stage is Stage.ENDED:
            return
        if self.peer.is_gone:
            raise PullFailed(f"{self.name}: {self.peer.error}")
        # Before asking: after a failed READ its connection is given up, which changes the next
        # question.
        try:
            self._read_and_prove()
        except ReadFailed as failure:
            if not self._try_again(failure):
                raise
        if self.peer.state == "ready":
            self._ask()
        else:
            self._on_disconnected()

    def give_up(self) -> None:
        """End the pull: the prefill rank need not wait for this reader any more. Then call
        ``settle`` until nothing is left.

        The blocks may belong to others from now on, unless a READ is in flight; no other READ
        begins.
        """
        self._given_up = True
        self._forget_begin_calls()
        if self.peer.state != "ready":
            self._on_disconnected()
        self.gives_up_telling_at = self._setup.clock() + self._command.timeout_s
        self.settle()

    def settle(self) -> None:
        """Tell the prefill rank of the end once it can be reached, and release the READ once that
        has ended.
        """
        if self.gives_up_telling_at is not None:
            if self.peer.state == "ready":
                if self.stage is Stage.CONNECTING:
                    # A reader's share of the lease ends only when it has begun.
                    self.peer.ask(self._begin_message, None)
                # Not by a notification of NIXL's, which is sent for whatever was read: of a READ
                # that was given up, and of memory that was deregistered.
                self._ask_about(PullEnd, None)
            # Gone: nobody is left to be told. Connecting: try until the deadline.
            is_late = self._setup.clock() >= self.gives_up_telling_at
            if self.peer.state == "ready" or self.peer.is_gone or is_late:
                self.gives_up_telling_at = None
        self.read.settle()

    def _on_disconnected(self) -> None:
        """Stop waiting for answers: none will come."""
        now = self._setup.clock()
        if self.stage is Stage.BEGINNING:
            self.stage, self._next_begin_at = Stage.CONNECTING, None
        # A heartbeat, or its answer, may have been lost with the connection.
        if self.stage is not Stage.CONNECTING:
            self._next_heartbeat_at = now
        if self._next_checksums_at is not None:
            self._next_checksums_at = now

    def _ask(self) -> None:
        """Send the next question, if one is due."""
        now = self._setup.clock()

        def is_due(at: float | None) -> bool:
            return at is not None and at <= now

        if self.stage is Stage.CONNECTING or is_due(self._next_begin_at):
            self.stage, self._next_begin_at = Stage.BEGINNING, now + REPEAT_S
            on_reply = partial(self._on_reply, now)
            self._begin_calls.append(self.peer.ask(self._begin_message, on_reply))
        if is_due(self._next_checksums_at):
            self._next_checksums_at = now + REPEAT_S
            self._ask_about(StateChecksums, partial(self._on_reply, now))
        if is_due(self._next_heartbeat_at):
            self._heartbeat_sent_at = now
            self._next_heartbeat_at = now + self._heartbeat_s
            self._ask_about(PullHeartbeat, partial(self._on_reply, now))

    def _forget_begin_calls(self) -> None:
        """Drop the answers to repetitions of the same question: one is enough."""
        while self._begin_calls:
            self.peer.forget(self._begin_calls.pop())

    def _ask_about(
        self,
        kind: type[StateChecksums | PullHeartbeat | PullEnd],
        on_reply: Callable[[ToDecodeSide], None] | None,
    ) -> None:
        engine_id, lease_id = self._command.remote.engine_id, self._command.remote.lease_id
        reader = self._reader
        self.peer.ask(
            lambda call_id: kind(
                call_id=call_id, engine_id=engine_id, lease_id=lease_id, reader=reader
            ),
            on_reply,
        )

    def _begin_message(self, call_id: int) -> PullBegin:
        return PullBegin(
            call_id=call_id,
            engine_id=self._command.remote.engine_id,
            lease_id=self._command.remote.lease_id,
            reader=self._reader,
            num_decode_ranks=self._num_decode_ranks,
        )

    def _on_reply(self, asked_at: float, reply: ToDecodeSide) -> None:
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
                self._take_lease(asked_at, reply)
            case PullReply():
                return  # To a PullBegin that was repeated.
            case ChecksumsReply():
                if self.read.lacks_checksums:
                    self.read.state(reply.groups)
                    self._next_checksums_at = None
                    self._read_and_prove()
            case HeartbeatReply():
                self._heartbeat_answered_at = max(self._heartbeat_answered_at, asked_at)
                if self.stage in (Stage.READING, Stage.VERIFYING, Stage.PROVEN):
                    self._held_until_at = asked_at + reply.lease_s
                    self._next_heartbeat_at = self._setup.clock() + self._heartbeat_s
            case Refused():
                # A refusal after the lease was granted means that it has ended: later READs may
                # have brought another request's blocks, and count as late.
                raise PullFailed(
                    f"{self.name} refused: {reply.reason}", late=self._held_until_at is not None
                )
            case _:
                raise PullFailed(f"{self.name}: unexpected {type(reply).__name__}")

    def _take_lease(self, asked_at: float, reply: PullReply) -> None:
        """Begin to read under the lease before anything else: the READ takes longest.

        The seconds in the answer count from the question: this rank does not know when the answer
        was sent.
        """
        self._forget_begin_calls()
        self.stage, self._next_begin_at = Stage.READING, None
        logger.debug("%s: lease at %s for %g s", self._command.request_id, self.name, reply.lease_s)
        self._held_until_at = asked_at + reply.lease_s
        self._heartbeat_s = reply.lease_s / HEARTBEATS_A_LEASE
        # Due one interval after the question; at once, where the answer took longer.
        self._next_heartbeat_at = max(self._setup.clock(), asked_at + self._heartbeat_s)
        self.read.begin(reply)
        if self.read.lacks_checksums:
            self._next_checksums_at = self._setup.clock()
        self._ask()
        self._read_and_prove()

    def _read_and_prove(self) -> None:
        """Poll the READ, and prove the blocks that have arrived. Raises ReadFailed, PullFailed."""
        self.read.advance()
        if self.stage is Stage.READING and self.read.is_complete:
            self.stage = Stage.VERIFYING
        if self.stage is not Stage.VERIFYING or not self._has_held():
            return
        try:
            if self.read.is_proven():
                self.stage = Stage.PROVEN
                self._note_checksums(ok=True)
        except VerificationError as error:
            self.verification_failed = True
            self._note_checksums(ok=False)
            logger.error("pull of %s from %s: %s", self._command.request_id, self.name, error)
            raise ReadFailed(f"{self.name}: {error}", verification=True) from error

    def _has_held(self) -> bool:
        """Return whether the lease is known to have held throughout the READ. Raises PullFailed
        when it has not.
        """
        ended_at = self.read.ended_at
        if self._setup.hasher is None and self._heartbeat_answered_at < ended_at:
            if self._heartbeat_sent_at < ended_at:
                self._next_heartbeat_at = self._setup.clock()
            return False
        assert self._held_until_at is not None
        if ended_at >= self._held_until_at:
            raise PullFailed(f"{self.name}: the lease did not hold throughout the READ", late=True)
        return True

    def _note_checksums(self, *, ok: bool) -> None:
        if self._setup.hasher is not None:
            self._log.add("checksums", self.read.ended_at, None, source=self.name, ok=ok)

    def _try_again(self, failure: ReadFailed) -> bool:
        """Begin again: the READ is over and writes no more. Returns False when no attempt is
        left.
        """
        if self.num_retries + 1 >= self._command.num_attempts:
            return False
        self.num_retries += 1
        logger.warning("pull of %s begins anew: %s", self._command.request_id, failure)
        self.stage = Stage.CONNECTING
        self._next_begin_at = self._next_checksums_at = self._next_heartbeat_at = None
        return True


class Pull:
    """Drives one ``StartPull``; ends in one PullFinished, and one PullDrained where that said
    ``in_flight``.
    """

    def __init__(
        self, command: StartPull, sources: list[tuple[SourceRank, Peer]], setup: DecodeSetup
    ) -> None:
        """``sources`` are the prefill ranks that this rank turns to."""
        self.command = command
        self._setup = setup
        self._log = SpanLog(setup.clock)
        self._shares = [
            SharePull(command, source, peer, setup, self._log) for source, peer in sources
        ]
        self._started_at = setup.clock()
        self._finished = False
        self._draining = False

    @property
    def holds_blocks(self) -> bool:
        """Return whether blocks of this rank belong to the pull."""
        return not self._finished or self._draining

    @property
    def closed(self) -> bool:
        """Return whether nothing is left to do or to wait for."""
        owes_end = any(share.gives_up_telling_at is not None for share in self._shares)
        return not self.holds_blocks and not owes_end

    @property
    def hashing_since_at(self) -> float | None:
        """Return when the latest of the checksums that are being computed were asked for."""
        verifying = [share for share in self._shares if share.stage is Stage.VERIFYING]
        if self._finished:
            return None
        return max((share.read.ended_at for share in verifying), default=None)

    def next_deadline_at(self) -> float | None:
        """Return when ``advance`` has something to do, READs and messages aside."""
        due_at = [share.next_deadline_at() for share in self._shares]
        if not self._finished:
            due_at.append(self._started_at + self.command.timeout_s)
        return min((at for at in due_at if at is not None), default=None)

    def cancel(self) -> None:
        if not self._finished:
            self._fail(PullFailed("cancelled"))

    def advance(self) -> None:
        """Do what can be done now; never waits."""
        if self._finished:
            for share in self._shares:
                share.settle()
            if self._draining and not any(share.read.in_flight for share in self._shares):
                self._draining = False
                self._setup.emit(PullDrained(pull_id=self.command.pull_id))
            return
        try:
            self._step()
        except PullFailed as failure:
            self._fail(failure)

    def _step(self) -> None:
        shares, timeout_s = self._shares, self.command.timeout_s
        for share in shares:
            share.advance()
        if self._setup.clock() >= self._started_at + timeout_s:
            where = ", ".join(f"{share.name} is {share.stage.name.lower()}" for share in shares)
            raise PullFailed(f"no end within {timeout_s:g} s; {where}")
        if all(share.is_proven for share in shares):
            for share in shares:
                share.stage = Stage.ENDED
                share.give_up()
            self._finish()

    def _fail(self, failure: PullFailed) -> None:
        # First: no READ may begin after the engine hears of the end and reuses the blocks.
        for share in self._shares:
            share.give_up()
        self._draining = any(share.read.in_flight for share in self._shares)
        self._finish(failure)

    def _finish(self, failure: PullFailed | None = None) -> None:
        self._finished = True
        setup, command, shares = self._setup, self.command, self._shares
        error = "" if failure is None else str(failure)
        logger.debug(
            "pull of %s has ended: %s", command.request_id, error or "the blocks are proven"
        )
        event = PullFinished(
            pull_id=command.pull_id,
            ok=failure is None,
            error=error,
            in_flight=self._draining,
            seconds=setup.clock() - self._started_at,
            verification_failed=any(share.verification_failed for share in shares),
            num_retries=sum(share.num_retries for share in shares),
            reports={setup.identity.tp_rank: self._log.report()} if command.records_spans else {},
        )
        if failure is None:
            event.num_bytes = sum(share.read.num_bytes for share in shares)
            event.read_s = max(share.read.read_s for share in shares)
            # Names of ranks begin with that of their engine.
            event.prefill = shares[0].name.partition("/")[0]
            event.path = join_paths(share.peer.path for share in shares)
        else:
            event.late = failure.late
            event.verification_failed |= failure.verification
        setup.emit(event)


class PullTable:
    """Starts, drives and cancels pulls."""

    def __init__(self, setup: DecodeSetup, peers: PeerTable) -> None:
        self._setup = setup
        self._peers = peers
        self._pulls: dict[PullId, Pull] = {}

    def __len__(self) -> int:
        return len(self._pulls)

    @property
    def hold_blocks(self) -> bool:
        """Return whether blocks of this rank belong to a pull. If not, pulls may still have to tell
        prefill ranks of their end.
        """
        return any(pull.holds_blocks for pull in self._pulls.values())

    @property
    def hashing_since_at(self) -> float | None:
        """Return when the latest of the checksums that are being computed were asked for."""
        since_at = [pull.hashing_since_at for pull in self._pulls.values()]
        return max((at for at in since_at if at is not None), default=None)

    def start(self, command: StartPull) -> None:
        """Begin a pull. The registry shows its prefill ranks by their engine_id: the host and port
        of the request are not trusted.
        """
        assert command.pull_id not in self._pulls
        try:
            sources = self._peers.sources_of(command.remote.engine_id)
        except TransferError as error:
            self._setup.emit(PullFinished(pull_id=command.pull_id, ok=False, error=str(error)))
            return
        self._pulls[command.pull_id] = Pull(command, sources, self._setup)

    def cancel(self, command: CancelPull) -> None:
        """Cancel a pull. Unknown pulls have ended already."""
        if (pull := self._pulls.get(command.pull_id)) is not None:
            pull.cancel()

    def advance(self) -> None:
        for pull in list(self._pulls.values()):
            pull.advance()
            if pull.closed:
                del self._pulls[pull.command.pull_id]

    def next_deadline_at(self) -> float | None:
        """Return when ``advance`` has something to do, READs and messages aside."""
        due_at = [pull.next_deadline_at() for pull in self._pulls.values()]
        return min((at for at in due_at if at is not None), default=None)
