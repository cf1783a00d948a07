"""Pulls the blocks of prompts, each from one or more prefill ranks into blocks of this rank.

The stages of one prefill rank's share::

    beginning ── lease ──> reading ── all read ──> verifying ── equal ──> proven ── all are ──> end
        ▲                     │                        │
        └── READ failed, or wrong bytes ───────────────┘
    ended, or failed here or elsewhere: the prefill rank is told as soon as it can be reached

Every question may be asked again: after a time without an answer, and over a new connection.

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

# A question without an answer is asked again after this time: a connection between two hosts may
# break unnoticed.
REPEAT_S = 5.0
HEARTBEATS_A_LEASE = 4
Question = type[PullBegin | StateChecksums | PullHeartbeat | PullEnd]


class Share:
    """Pulls one prefill rank's KV blocks of a prompt, and tells that rank when it is done."""

    def __init__(
        self, command: StartPull, source: SourceRank, peer: Peer, setup: DecodeSetup, log: SpanLog
    ) -> None:
        self.name = peer.name
        self.peer = peer
        self.is_proven = False  # the blocks have arrived and are proven
        self.num_retries = 0
        self.num_bytes = 0  # size of the latest READ
        self.read_s = 0.0  # duration of that READ, as exactly as the connector knows
        self.ended_at: float | None = None  # instant at which it was over; None before
        self.counters: set[str] = set()  # of the READs that failed; see ``PullFailed``
        # Deadline for telling the prefill rank of the end; None: not yet, or told.
        self.tells_until_at: float | None = None
        self._command = command
        self._source = source
        self._setup = setup
        self._log = log
        # Unique over engines, ranks and choices; of bounded length, however long the id is.
        digest = hashlib.sha256(command.pull_id.encode()).hexdigest()
        identity = setup.identity
        self._reader = ReaderId(f"{identity.engine_id}/{identity.tp_rank}/{digest}")
        # Questions that want an answer, in their order, and when each is asked next.
        self._ask_at: dict[Question, float] = {}
        self._read: Read | None = None  # the READ that may still write to the blocks
        self._started_at = 0.0
        self._heartbeat_s = 0.0
        # Instant until which the lease is known to hold; None before there was one.
        self._held_until_at: float | None = None
        # Instants at which the last heartbeat, and the last one that was answered, were sent.
        self._heartbeat_sent_at = self._heartbeat_answered_at = 0.0
        self._refusal: Refused | None = None
        self._begin()

    @property
    def in_flight(self) -> bool:
        return self._read is not None

    @property
    def is_verifying(self) -> bool:
        return self.ended_at is not None and not self.is_proven

    @property
    def stage(self) -> str:
        """Return what the share waits for, for people."""
        if self._lease is None:
            return "beginning" if self.peer.state == "ready" else "connecting"
        if self.ended_at is None:
            return "reading"
        return "proven" if self.is_proven else "verifying"

    def deadlines(self) -> Iterator[float]:
        """Yield when there is something to ask, before the end."""
        if self.peer.state == "ready":
            yield from self._ask_at.values()

    def advance(self) -> None:
        if self.peer.is_gone:
            raise PullFailed(f"{self.name}: {self.peer.error}")
        if (refusal := self._refusal) is not None:
            # A refusal after the grant means that the lease has ended: later READs may have brought
            # another request's blocks, and count as late.
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
            logger.warning("pull of %s begins anew: %s", self._command.request_id, failure)
            self._begin()
        if self.peer.state == "ready":
            self._ask()
        else:
            # A question, or its answer, may have been lost with the connection.
            self._ask_at = dict.fromkeys(self._ask_at, self._setup.clock())

    def end(self) -> None:
        """End the pull: the prefill rank need not wait for this reader any more. Then call
        ``settle`` until nothing is left.

        The blocks may belong to others from now on, unless a READ is in flight; no other READ
        begins.
        """
        self.tells_until_at = self._setup.clock() + self._setup.settings.pull_timeout_s
        self.settle()

    def settle(self) -> None:
        """Tell the prefill rank of the end once it can be reached; release an ended READ."""
        if self.tells_until_at is not None:
            is_ready = self.peer.state == "ready"
            if is_ready:
                if PullBegin in self._ask_at:
                    # A reader's share of the lease ends only when it has begun.
                    self._send(PullBegin)
                # Not by a notification of NIXL's, which is sent for whatever was read: of a READ
                # that was given up, and of memory that was deregistered.
                self._send(PullEnd)
            # Gone: nobody is left to be told. Connecting: try until the deadline.
            if is_ready or self.peer.is_gone or self._setup.clock() >= self.tells_until_at:
                self.tells_until_at = None
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
            # At once: the prefill rank answers when it has them, while the READ goes on.
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
        """Send a question; ``asked_at`` is None if no answer is needed."""
        remote = self._command.remote
        more: dict[str, Any] = {}
        if kind is PullBegin:
            more["num_decode_ranks"] = self._source.num_decode_ranks
        self.peer.ask(
            lambda call_id: kind(
                call_id=call_id,
                engine_id=remote.engine_id,
                lease_id=remote.lease_id,
                reader=self._reader,
                **more,
            ),
            None if asked_at is None else partial(self._on_reply, asked_at),
        )

    def _on_reply(self, asked_at: float, reply: ToDecodeSide) -> None:
        """Keep an answer for ``advance``; ignore repeated answers."""
        # Seconds in an answer count from its question: when it was sent is not known here.
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
        """Start the READ, poll it, and prove the blocks that have arrived. Raises PullFailed."""
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
        """Read under the lease before anything else: the READ takes longest."""
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
            reason = f"{self.name}: the lease did not hold throughout the READ"
            raise PullFailed(reason, counter=LATE, blames_pair=False)
        return True

    def _is_right(self) -> bool:
        if self._setup.hasher is None or self._found is None:
            return True
        # A READ may end first: the prefill rank begins its checksums once it has answered.
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
    """Drives one ``StartPull`` to one PullFinished; one PullDrained follows if in flight."""

    def __init__(
        self, command: StartPull, sources: list[tuple[SourceRank, Peer]], setup: DecodeSetup
    ) -> None:
        """``sources`` are the prefill ranks that this rank turns to."""
        self._command = command
        self._setup = setup
        self._log = SpanLog(setup.clock)
        self._shares = [Share(command, source, peer, setup, self._log) for source, peer in sources]
        self._started_at = setup.clock()
        self._finished = False
        self._draining = False

    @property
    def holds_blocks(self) -> bool:
        """Return whether blocks of this rank belong to the pull."""
        return not self._finished or self._draining

    @property
    def closed(self) -> bool:
        owes_end = any(share.tells_until_at is not None for share in self._shares)
        return not self.holds_blocks and not owes_end

    def hashing_since(self) -> Iterator[float]:
        """Yield when the checksums that are being computed were asked for."""
        for share in self._shares:
            if share.is_verifying and share.ended_at is not None and not self._finished:
                yield share.ended_at

    def deadlines(self) -> Iterator[float]:
        if not self._finished:
            yield self._started_at + self._setup.settings.pull_timeout_s
        for share in self._shares:
            if not self._finished:
                yield from share.deadlines()
            elif share.tells_until_at is not None:
                yield share.tells_until_at

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
                raise PullFailed(f"no end within {timeout_s:g} s; {where}")
        except PullFailed as failure:
            self._finish(failure)

    def _finish(self, failure: PullFailed | None = None) -> None:
        # First: no READ may begin after the engine hears of the end and reuses the blocks.
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
            # Names of ranks begin with that of their engine.
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
        """Return when the checksums that are being computed were asked for."""
        return [at for pull in self._pulls.values() for at in pull.hashing_since()]

    def deadlines(self) -> list[float]:
        """Return when ``advance`` has something to do, READs and messages aside."""
        return [at for pull in self._pulls.values() for at in pull.deadlines()]

    def start(self, command: StartPull) -> None:
        """Begin a pull from ranks of the registry: the request's host and port are not trusted."""
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
