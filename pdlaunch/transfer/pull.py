"""Pulls the KV blocks of prompts from prefill ranks into blocks of this rank. A pull has one share
for each prefill rank that it reads from.

The stages of a share::

    beginning ── lease ──> reading ── all read ──> verifying ── equal ──> proven ── all are ──> end
        ▲                     │                        │
        └── READ failed, or wrong bytes ───────────────┘
    When the pull has ended or failed, each prefill rank gets a PullEnd once it can be reached.

Questions are repeated if no answer arrives in time, or if the connection is replaced.

Each answer has the lease's remaining seconds. The decode rank counts them from the time of its
question, so its deadline is never later than the lease's. A READ that ends before this deadline has
read leased blocks, because the prefill rank does not end a lease early while a pull is open.

Checksums prove the bytes even if the prefill rank has died. Without checksums, a READ counts only
after the prefill rank has answered a heartbeat that was sent after the READ's end: libraries may
report a READ from a dead process as done.

A READ that failed or brought wrong bytes has ended, so it is repeated under the same lease into the
same blocks. The other shares are not repeated. If a pull fails while a READ is pending, the READ
still owns its destination blocks: the pull reports ``in_flight`` and stays until the READ ends.
"""

import hashlib
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

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
from pdlaunch.protocol.transfer import CancelPull, PullDrained, PullFinished, StartPull, join_paths
from pdlaunch.transfer.connectors.connector import Read
from pdlaunch.transfer.handshake import DecodeSetup, SourceRank
from pdlaunch.transfer.integrity.checksum import Checksums
from pdlaunch.transfer.peers import Peer, PeerTable
from pdlaunch.transfer.proof import LATE, UNPROVEN, PullFailed, ReadFailed, ReadPlan, plan_read

logger = logging.getLogger(__name__)

# Seconds without an answer after which a question is repeated: a connection between two hosts can
# break without notice.
REPEAT_S = 5.0
HEARTBEATS_A_LEASE = 4
Question = type[PullBegin | StateChecksums | PullHeartbeat | PullEnd]


class Share:
    """Pulls one prefill rank's KV blocks of a prompt, then sends that rank a PullEnd."""

    def __init__(
        self, command: StartPull, source: SourceRank, peer: Peer, setup: DecodeSetup, log: SpanLog
    ) -> None:
        self.name = peer.name
        self.peer = peer
        self.is_proven = False  # the blocks have arrived and are proven
        self.num_retries = 0
        self.num_bytes = 0  # size of the latest READ
        self.read_s = 0.0  # duration of that READ, measured by the connector
        self.ended_at: float | None = None  # when that READ succeeded; None before
        self.counters: set[str] = set()  # counters of the failed READs; see ``PullFailed``
        # Deadline for sending PullEnd. None: the pull is not over, or PullEnd was sent or given up.
        self.answers_until_at: float | None = None
        self._command = command
        self._source = source
        self._setup = setup
        self._log = log
        # Unique over engines, ranks and choices. Hashed, because a pull_id may be of any length.
        digest = hashlib.sha256(command.pull_id.encode()).hexdigest()
        identity = setup.identity
        self._reader = ReaderId(f"{identity.engine_id}/{identity.tp_rank}/{digest}")
        # Questions without an answer yet, in the order of sending, and when each is sent next.
        self._ask_at: dict[Question, float] = {}
        self._read: Read | None = None  # the READ that may still write to the blocks
        self._started_at = 0.0
        self._heartbeat_s = 0.0
        # The lease holds at least until then; None before the first PullReply.
        self._held_until_at: float | None = None
        # When the latest heartbeat was sent, and the latest heartbeat that was answered.
        self._heartbeat_sent_at = self._heartbeat_answered_at = 0.0
        self._refusal: Refused | None = None
        self._begin()

    @property
    def in_flight(self) -> bool:
        return self._read is not None

    @property
    def stage(self) -> str:
        if self._lease is None:
            return "beginning" if self.peer.state == "ready" else "connecting"
        if self.ended_at is None:
            return "reading"
        return "proven" if self.is_proven else "verifying"

    def deadlines(self) -> Iterator[float]:
        """Yield when to send each question next, while the pull is open."""
        if self.peer.state == "ready":
            yield from self._ask_at.values()

    def advance(self) -> None:
        if self.peer.is_gone:
            raise PullFailed(f"{self.name}: {self.peer.error}")
        if (refusal := self._refusal) is not None:
            # A refusal after the PullReply means that the lease has ended. The READ may have
            # brought another request's blocks, so it counts as late.
            is_late = self._held_until_at is not None or refusal.lease_end is not None
            reason = f"{self.name} refused: {refusal.reason}"
            counter = LATE if is_late else ""
            raise PullFailed(reason, counter=counter, blames_pair=not is_late)
        try:
            self._read_and_prove()
        except ReadFailed as failure:
            self.counters.add(failure.counter)
            if self.num_retries + 1 >= self._setup.settings.pull_attempts:
                raise
            self.num_retries += 1
            logger.warning("READ for %s is repeated: %s", self._command.request_id, failure)
            self._begin()
        if self.peer.state == "ready":
            self._ask()
        else:
            # A question, or its answer, may have been lost with the connection.
            self._ask_at = dict.fromkeys(self._ask_at, self._setup.clock())

    def end(self) -> None:
        """Start no more READs and send PullEnd. Then call ``settle`` until ``in_flight`` is False
        and ``answers_until_at`` is None. The blocks are free unless a READ is in flight.
        """
        self.answers_until_at = self._setup.clock() + self._setup.settings.pull_timeout_s
        self.settle()

    def settle(self) -> None:
        """Send PullEnd once the prefill rank can be reached; release an ended READ."""
        if self.answers_until_at is not None:
            is_ready = self.peer.state == "ready"
            if is_ready:
                if PullBegin in self._ask_at:
                    # The prefill rank refuses a PullEnd without a PullBegin, and its lease stays.
                    self._send(PullBegin)
                # NIXL's notifications cannot replace PullEnd: NIXL also sends one for a READ that
                # was given up, or that read deregistered memory.
                self._send(PullEnd)
            # If the peer is gone, give up. If it is connecting, try until the deadline.
            if is_ready or self.peer.is_gone or self._setup.clock() >= self.answers_until_at:
                self.answers_until_at = None
        if self._read is not None and self._read.poll() != "pending":
            self._release(self._read)

    def _begin(self) -> None:
        self._lease: PullReply | None = None
        self._plan: ReadPlan | None = None
        self._stated: list[bytes] | None = None
        self._found: Checksums | None = None
        self.ended_at = None
        now = self._setup.clock()
        self._ask_at = {PullBegin: now}
        if self._setup.hasher is not None:
            # Ask now: the prefill rank computes its checksums while the READ runs.
            self._ask_at[StateChecksums] = now

    def _ask(self) -> None:
        now = self._setup.clock()
        for kind, at in list(self._ask_at.items()):
            if at <= now:
                is_heartbeat = kind is PullHeartbeat
                self._ask_at[kind] = now + (self._heartbeat_s if is_heartbeat else REPEAT_S)
                if is_heartbeat:
                    self._heartbeat_sent_at = now
                self._send(kind, asked_at=now)

    def _send(self, kind: Question, asked_at: float | None = None) -> None:
        """Send a question; ``asked_at`` is None to ignore the answer."""
        remote = self._command.remote
        more: dict[str, Any] = {}
        if kind is PullBegin:
            more["num_decode_ranks"] = self._source.num_decode_ranks
        question = kind(
            call_id=0,
            engine_id=remote.engine_id,
            lease_id=remote.lease_id,
            reader=self._reader,
            **more,
        )
        self.peer.ask(question, None if asked_at is None else partial(self._on_reply, asked_at))

    def _on_reply(self, asked_at: float, reply: ToDecodeSide) -> None:
        """Keep an answer for ``advance``; ignore repeated answers."""
        # Count the lease's seconds from the question: when the answer was sent is unknown.
        match reply:
            case PullReply() if self._lease is None:
                self._lease = reply
                self._held_until_at = asked_at + reply.lease_s
                self._heartbeat_s = reply.lease_s / HEARTBEATS_A_LEASE
                del self._ask_at[PullBegin]
                self._ask_at[PullHeartbeat] = asked_at + self._heartbeat_s
            case ChecksumsReply():
                self._stated = reply.groups
                self._ask_at.pop(StateChecksums, None)
            case HeartbeatReply():
                self._heartbeat_answered_at = max(self._heartbeat_answered_at, asked_at)
                if self._lease is not None:
                    self._held_until_at = asked_at + reply.lease_s
            case Refused():
                self._refusal = reply
            case PullReply():
                pass
            case _:
                reason = f"unexpected {type(reply).__name__}"
                self._refusal = Refused(call_id=reply.call_id, reason=reason)

    def _read_and_prove(self) -> None:
        """Start the READ, poll it, and prove the blocks when it has ended. Raises PullFailed."""
        if self._lease is not None and self._plan is None and self.peer.state == "ready":
            self._start_read(self._lease)
        if self._read is not None and (state := self._read.poll()) != "pending":
            self._on_read(self._read, state == "done")
        if self.ended_at is None or self.is_proven or not self._has_held(self.ended_at):
            return
        try:
            self.is_proven = self._is_right()
        except VerificationError as error:
            self._note_checksums(ok=False)
            logger.error("pull of %s from %s: %s", self._command.request_id, self.name, error)
            raise ReadFailed(f"{self.name}: {error}", counter=UNPROVEN) from error

    def _start_read(self, lease: PullReply) -> None:
        setup, command, peer = self._setup, self._command, self.peer
        try:
            self._plan = plan_read(
                command,
                lease,
                peer.geometry,
                self._source.heads,
                setup.first_kv_head,
                f"{self.name} {self._reader}",
            )
        except PullFailed as failure:
            raise PullFailed(f"{self.name}: {failure}", counter=failure.counter) from None
        blocks, self._started_at = self._plan.blocks, setup.clock()
        self.num_bytes = setup.memory.kv.num_bytes(blocks.local_blocks, len(blocks.local_heads))
        if not self.num_bytes:
            self.ended_at = self._started_at
            return
        try:
            self._read = peer.read(blocks, command.remote.lease_id, self._reader)
        except TransferError as error:
            peer.reconnect()
            raise ReadFailed(f"{self.name}: {error}") from error

    def _on_read(self, read: Read, done: bool) -> None:
        ended_at = self._setup.clock()
        self.read_s = read.seconds() if done else 0.0
        self._release(read)
        assert self._plan is not None
        blocks = self._plan.blocks
        self._log.add(
            "read",
            self._started_at,
            ended_at,
            source=self.name,
            bytes=self.num_bytes,
            gb_s=round(self.num_bytes / self.read_s / 1e9, 3) if self.read_s else None,
            blocks=sum(map(len, blocks.local_blocks)),
            state="done" if done else "failed",
        )
        if not done:
            self.peer.reconnect()
            raise ReadFailed(f"READ from {self.name} failed")
        self.ended_at = ended_at
        if self._setup.hasher is not None:
            heads = slice(blocks.local_heads.start, blocks.local_heads.stop)
            self._found = self._setup.hasher.start(blocks.local_blocks, heads)

    def _has_held(self, ended_at: float) -> bool:
        if self._setup.hasher is None and self._heartbeat_answered_at < ended_at:
            if self._heartbeat_sent_at < ended_at:
                self._ask_at[PullHeartbeat] = self._setup.clock()
            return False
        assert self._held_until_at is not None
        if ended_at >= self._held_until_at:
            reason = f"{self.name}: the lease may have ended before the READ"
            raise PullFailed(reason, counter=LATE, blames_pair=False)
        return True

    def _is_right(self) -> bool:
        if self._setup.hasher is None or self._found is None:
            return True
        # The READ may end before the prefill rank has computed and sent its checksums.
        if self._stated is None or not self._found.ready():
            return False
        assert self._plan is not None
        self._plan.check(self._stated, self.peer.geometry.num_kv_heads, self._found.result())
        self._note_checksums(ok=True)
        return True

    def _note_checksums(self, *, ok: bool) -> None:
        assert self.ended_at is not None
        self._log.add("checksums", self.ended_at, None, source=self.name, ok=ok)

    def _release(self, read: Read) -> None:
        self.peer.release(read)
        self._read = None


class Pull:
    """Runs one ``StartPull``: emits a PullFinished, then a PullDrained if it was in flight."""

    def __init__(
        self, command: StartPull, sources: list[tuple[SourceRank, Peer]], setup: DecodeSetup
    ) -> None:
        self._command = command
        self._setup = setup
        self._log = SpanLog(setup.clock)
        self._shares = [Share(command, source, peer, setup, self._log) for source, peer in sources]
        self._started_at = setup.clock()
        self._finished = False
        self._draining = False

    @property
    def holds_blocks(self) -> bool:
        """Return True while the pull owns blocks of this rank."""
        return not self._finished or self._draining

    @property
    def closed(self) -> bool:
        owes_end = any(share.answers_until_at is not None for share in self._shares)
        return not self.holds_blocks and not owes_end

    def hashing_since(self) -> Iterator[float]:
        """Yield the end times of READs whose checksums are not compared yet."""
        for share in self._shares:
            if share.ended_at is not None and not share.is_proven and not self._finished:
                yield share.ended_at

    def deadlines(self) -> Iterator[float]:
        if not self._finished:
            yield self._started_at + self._setup.settings.pull_timeout_s
        for share in self._shares:
            if not self._finished:
                yield from share.deadlines()
            elif share.answers_until_at is not None:
                yield share.answers_until_at

    def cancel(self) -> None:
        if not self._finished:
            self._finish(PullFailed("cancelled", blames_pair=False))

    def advance(self) -> None:
        if self._finished:
            for share in self._shares:
                share.settle()
            if self._draining and not any(share.in_flight for share in self._shares):
                self._draining = False
                self._setup.emit(PullDrained(pull_id=self._command.pull_id))
            return
        timeout_s = self._setup.settings.pull_timeout_s
        try:
            for share in self._shares:
                share.advance()
            if all(share.is_proven for share in self._shares):
                self._finish()
            elif self._setup.clock() >= self._started_at + timeout_s:
                where = ", ".join(f"{share.name} is {share.stage}" for share in self._shares)
                raise PullFailed(f"the pull did not end within {timeout_s:g} s; {where}")
        except PullFailed as failure:
            self._finish(failure)

    def _finish(self, failure: PullFailed | None = None) -> None:
        # End the shares first: the engine reuses the blocks once it has the event.
        for share in self._shares:
            share.end()
        self._finished = True
        self._draining = any(share.in_flight for share in self._shares)
        setup, command, shares = self._setup, self._command, self._shares
        error = "" if failure is None else str(failure)
        counters = {"" if failure is None else failure.counter}
        logger.debug(
            "pull of %s has ended: %s", command.request_id, error or "the blocks are proven"
        )
        event = PullFinished(
            pull_id=command.pull_id,
            ok=failure is None,
            error=error,
            in_flight=self._draining,
            blames_pair=failure is not None and failure.blames_pair,
            seconds=setup.clock() - self._started_at,
            counts=dict.fromkeys(counters.union(*(one.counters for one in shares)) - {""}, 1)
            | {"kv_pull_retries": sum(share.num_retries for share in shares)},
            reports={setup.identity.tp_rank: self._log.report()} if command.records_spans else {},
        )
        if failure is None:
            event.num_bytes = sum(share.num_bytes for share in shares)
            event.read_s = max(share.read_s for share in shares)
            # The engine's name is the first part of a rank's name.
            event.prefill = shares[0].name.partition("/")[0]
            event.path = join_paths(share.peer.path for share in shares)
        setup.emit(event)


class PullTable:
    def __init__(self, setup: DecodeSetup, peers: PeerTable) -> None:
        self._setup = setup
        self._peers = peers
        self._pulls: dict[PullId, Pull] = {}

    def __len__(self) -> int:
        return len(self._pulls)

    @property
    def hold_blocks(self) -> bool:
        return any(pull.holds_blocks for pull in self._pulls.values())

    def hashing_since(self) -> list[float]:
        """Return the end times of READs whose checksums are not compared yet."""
        return [at for pull in self._pulls.values() for at in pull.hashing_since()]

    def deadlines(self) -> list[float]:
        """Return when ``advance`` must run even if no READ ends and no message arrives."""
        return [at for pull in self._pulls.values() for at in pull.deadlines()]

    def start(self, command: StartPull) -> None:
        """Start a pull. Addresses are from the registry: the request's host is not trusted."""
        assert command.pull_id not in self._pulls
        try:
            sources = self._peers.sources_of(command.remote.engine_id)
        except TransferError as error:
            event = PullFinished(
                pull_id=command.pull_id, ok=False, error=str(error), blames_pair=True
            )
            self._setup.emit(event)
            return
        self._pulls[command.pull_id] = Pull(command, sources, self._setup)

    def cancel(self, command: CancelPull) -> None:
        if (pull := self._pulls.get(command.pull_id)) is not None:
            pull.cancel()

    def advance(self) -> None:
        for pull_id, pull in list(self._pulls.items()):
            pull.advance()
            if pull.closed:
                del self._pulls[pull_id]
