"""The share of a pull that one holder rank has: what is asked of the holder, and the lease. Its
READs: ``part_reads.py``.

::

    connecting ─ begin ─> beginning ─ there is a lease ─> reading ─ all is read ─> verifying ─ equal ─> proven ─ all are ─> ended
       ▲  ▲                │ ▲  └ more blocks are ready ┐    │                        │
       │  └─ disconnected ─┘ └───────── ask again ──────┘    │                        │
       └───────────── READ failed, or wrong bytes: once more ┴────────────────────────┘
    ended, or the pull has failed, here or elsewhere: the holder is told as soon as it can be reached

A pull that awaits its prompt begins while that is computed: each answer tells which blocks are
ready, and is followed by the next question, until one tells of the lease. The holder states the
checksums by a message of their own, while the rest is read.

A lease has held throughout the READ when the READ is over before the lease can be: the holder says
how many seconds are left when it answers, which is after it was asked, and never ends it before
while the pull is open. So nobody has to be asked afterwards.

Checksums prove the bytes, whatever became of the holder meanwhile. Without them a READ counts only
once the holder has answered a heartbeat that was sent after its end: the libraries may call a READ
from the memory of a dead process done.

A READ that failed or brought wrong bytes is repeated under the same lease, into the same blocks: it
is over and writes no more. So other branches, and other ranks, need not pull again what they have
proven.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum, auto
from functools import partial

from pdlaunch.errors import VerificationError
from pdlaunch.protocol.kv_params import FirstToken
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
from pdlaunch.transfer.decode_side.chunked_reads import ChunkedReads, ReadFailed
from pdlaunch.transfer.decode_side.links import PrefillLink, PullSetup
from pdlaunch.transfer.decode_side.read_plan import PullFailed, Share

logger = logging.getLogger(__name__)

HEARTBEATS_A_LEASE = 4
REPEAT_S = 5.0
"""Until a question without an answer is asked again: a connection between two hosts may break
unnoticed.
"""


class Stage(Enum):
    CONNECTING = auto()
    BEGINNING = auto()
    READING = auto()
    VERIFYING = auto()
    PROVEN = auto()
    ENDED = auto()


class RankPull:
    """Talks to one holder rank and reads from it. The holder learns of the end, however the pull
    ends.
    """

    def __init__(
        self, command: StartPull, source: SourceRank, link: PrefillLink, setup: PullSetup
    ) -> None:
        self.name = link.name
        self.stage = Stage.CONNECTING
        self.num_retries = 0
        self.verification_failed = False
        self.lease_known_s: float | None = None
        """Clock time since when there is known to be a lease: all blocks can be read."""
        self.first_tokens: list[FirstToken] = []
        """What the lease says of them, once it is known."""
        self._command = command
        self._source = source
        self._link = link
        self._setup = setup
        self._reader = setup.reader(command.pull_id)
        self._reads = ChunkedReads(
            command,
            link,
            setup,
            Share(link.name, self._reader, source.heads, setup.first_kv_head),
        )
        self._begun: list[int] = []
        """Calls of pull_begin that have no answer."""
        self._version = 0
        """Of the last answer to one, from this connection."""
        self._next_begin_s = float("inf")
        """When pull_begin is asked again, while no lease is known."""
        self._next_checksums_s = float("inf")
        """When the checksums are asked for, while they are lacking."""
        self._held_until_s = 0.0
        """Clock time until which the lease is known to hold."""
        self._heartbeat_s = float("inf")
        """Seconds between two."""
        self._next_heartbeat_s = float("inf")
        self._awaits_heartbeat = False
        self._last_heartbeat_s = self._last_answered_s = 0.0
        """Clock times at which the last heartbeat, and the last one that was answered, were
        sent.
        """
        self._failure: PullFailed | None = None
        """Of an answer; ``advance`` is the one place for failures."""
        self._given_up = False
        self._owes_until_s: float | None = None
        """It is over, and the holder does not know yet: how long it is tried to tell it."""

    @property
    def num_bytes(self) -> int:
        return self._reads.num_bytes

    @property
    def read_s(self) -> float:
        """Of its READs, as exactly as the connector knows."""
        return self._reads.read_s

    @property
    def is_proven(self) -> bool:
        """The blocks are here and right."""
        return self.stage in (Stage.PROVEN, Stage.ENDED)

    @property
    def in_flight(self) -> bool:
        """A READ may still write to the blocks."""
        return self._reads.in_flight

    @property
    def hashing_since_s(self) -> float | None:
        """Clock time at which checksums were asked for that are still being computed."""
        return self._reads.ended_s if self.stage is Stage.VERIFYING else None

    @property
    def owes_end(self) -> bool:
        """It is over, and the holder does not know yet."""
        return self._owes_until_s is not None

    def next_deadline_s(self) -> float:
        """Clock time at which there is something to do, READs and messages aside."""
        if self._owes_until_s is not None:
            return self._owes_until_s
        if self._given_up or self._link.status != "ready":
            return float("inf")
        return min(self._next_heartbeat_s, self._next_begin_s, self._next_checksums_s)

    def advance(self) -> None:
        """Do what can be done now; never waits. Raises PullFailed."""
        if self._failure is not None:
            raise self._failure.without_traceback()
        if self.stage is Stage.ENDED:
            return
        if self._link.status in ("lost", "incompatible"):
            raise PullFailed(f"{self.name}: {self._link.error}")
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
        """All branches are proven, the pull is done: as ``give_up``."""
        self.stage = Stage.ENDED
        self.give_up()

    def give_up(self) -> None:
        """The pull is over: the holder need not wait for this reader any more. Then ``settle``
        until nothing is left.

        The blocks may belong to somebody else from now on, but for a READ that is in flight: no
        other may begin.
        """
        self._given_up = True
        self._forget_begun()
        if self._link.status != "ready":
            self._on_disconnected()
        self._owes_until_s = self._setup.clock() + self._command.timeout_s
        self.settle()

    def settle(self) -> None:
        """It is over: tell the holder once it can be told, and release the READ once that is over
        too.
        """
        if self._owes_until_s is not None:
            self._settle_end(self._owes_until_s)
        self._reads.settle()

    def _settle_end(self, owes_until_s: float) -> None:
        status = self._link.status
        if status == "ready":
            if self.stage is Stage.CONNECTING and (
                self.lease_known_s is not None or not self._command.awaits
            ):
                # A reader's share of the lease ends only when it has begun; who gives up before
                # there is one has none.
                self._link.ask(self._begin_message, None)
            self._ask_about(PullEnd, None)
        if status != "connecting" or self._setup.clock() >= owes_until_s:
            self._owes_until_s = None

    def _on_disconnected(self) -> None:
        """Answers that were awaited do not come any more."""
        now_s = self._setup.clock()
        self._version, self._awaits_heartbeat = 0, False
        if self.stage is Stage.BEGINNING:
            self.stage, self._next_begin_s = Stage.CONNECTING, float("inf")
        if self.stage is not Stage.CONNECTING:
            self._next_heartbeat_s = now_s
        if self._next_checksums_s != float("inf"):
            self._next_checksums_s = now_s

    def _ask(self) -> None:
        """Whatever is to be asked now."""
        now_s = self._setup.clock()
        if self.stage is Stage.CONNECTING or now_s >= self._next_begin_s:
            self._begin()
        if now_s >= self._next_checksums_s:
            self._ask_for_checksums()
        if now_s >= self._next_heartbeat_s:
            self._heartbeat()

    def _begin(self) -> None:
        """Also to learn more than the last answer has said: the holder answers when there is
        more.
        """
        now_s = self._setup.clock()
        self.stage, self._next_begin_s = Stage.BEGINNING, now_s + REPEAT_S
        self._begun.append(self._link.ask(self._begin_message, partial(self._on_reply, now_s)))

    def _forget_begun(self) -> None:
        """One answer is enough: nobody waits for those to the same question, asked again."""
        while self._begun:
            self._link.forget(self._begun.pop())

    def _ask_for_checksums(self) -> None:
        self._next_checksums_s = self._setup.clock() + REPEAT_S
        self._ask_about(StateChecksums, partial(self._on_reply, 0.0))

    def _heartbeat(self) -> None:
        """The next is due as long after this one, or after its answer."""
        now_s = self._setup.clock()
        self._next_heartbeat_s, self._awaits_heartbeat = now_s + self._heartbeat_s, True
        self._last_heartbeat_s = now_s
        self._ask_about(PullHeartbeat, partial(self._on_reply, now_s))

    def _ask_about(
        self,
        kind: type[StateChecksums | PullHeartbeat | PullEnd],
        on_reply: Callable[[ToDecodeSide], None] | None,
    ) -> None:
        """What concerns a pull that has begun."""
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
            awaits=self._command.awaits,
            version=self._version,
        )

    def _on_reply(self, asked_s: float, reply: ToDecodeSide) -> None:
        """``asked_s``: when the question was sent; the lease has at least the stated seconds from
        then on.
        """
        if self._given_up or self._failure is not None:
            return
        try:
            self._handle_reply(asked_s, reply)
        except ReadFailed as failure:
            if not self._try_again(failure):
                self._failure = failure.without_traceback()
        except PullFailed as failure:
            self._failure = failure.without_traceback()

    def _handle_reply(self, asked_s: float, reply: ToDecodeSide) -> None:
        match reply:
            case PullReply() if self.stage is Stage.BEGINNING:
                self._forget_begun()
                self._reads.offer(reply)
                if reply.leased:
                    self._take_lease(asked_s, reply)
                else:
                    self._version = reply.version
                    self._begin()
                    self._read()
            case PullReply():
                return  # to a pull_begin that was repeated
            case ChecksumsReply():
                if self._reads.lacks_checksums:
                    self._reads.state(reply.groups)
                    self._next_checksums_s = float("inf")
                    self._read()
            case HeartbeatReply():
                self._awaits_heartbeat = False
                self._last_answered_s = max(self._last_answered_s, asked_s)
                if self.stage in (Stage.READING, Stage.VERIFYING, Stage.PROVEN):
                    self._held_until_s = asked_s + reply.lease_s
                    self._next_heartbeat_s = self._setup.clock() + self._heartbeat_s
            case Refused():
                raise PullFailed(
                    f"{self.name} refused: {reply.reason}", late=self.lease_known_s is not None
                )
            case _:
                raise PullFailed(f"{self.name}: unexpected {type(reply).__name__}")

    def _take_lease(self, asked_s: float, reply: PullReply) -> None:
        """Read first, all else can wait. An answer that took long says little of how long the lease
        holds now.
        """
        now_s = self._setup.clock()
        self.stage, self._next_begin_s = Stage.READING, float("inf")
        self.first_tokens = reply.first_tokens
        self.lease_known_s = now_s if self.lease_known_s is None else self.lease_known_s
        self._held_until_s = asked_s + reply.lease_s
        self._heartbeat_s = reply.lease_s / HEARTBEATS_A_LEASE
        self._next_heartbeat_s = max(now_s, asked_s + self._heartbeat_s)
        if self._reads.lacks_checksums:
            self._next_checksums_s = now_s
        self._reads.start()
        self._ask()
        self._setup.alert(self._reads.num_bytes_in_flight)
        self._read()

    def _read(self) -> None:
        """Begin and end READs, and prove what they have brought. Raises ReadFailed, PullFailed."""
        self._reads.advance()
        if self.stage is Stage.READING and self._reads.is_complete:
            self.stage = Stage.VERIFYING
        if self.stage is Stage.VERIFYING and self._has_held():
            self._verify()

    def _has_held(self) -> bool:
        """The lease, throughout the READ. False: not known yet. Raises PullFailed."""
        if self._setup.hasher is None and self._last_answered_s < self._reads.ended_s:
            if self._last_heartbeat_s < self._reads.ended_s:
                self._next_heartbeat_s = self._setup.clock()
            return False
        if self._reads.ended_s < self._held_until_s:
            return True
        if self._command.awaits and (
            self._awaits_heartbeat or self._next_heartbeat_s <= self._setup.clock()
        ):
            # The answer was to a question of long before.
            return False
        raise PullFailed(f"{self.name}: the lease did not hold throughout the READ", late=True)

    def _verify(self) -> None:
        try:
            if self._reads.is_proven():
                self.stage = Stage.PROVEN
        except VerificationError as error:
            self.verification_failed = True
            logger.error("pull %s from %s: %s", self._command.pull_id, self.name, error)
            self._reads.forget()
            raise ReadFailed(f"{self.name}: {error}", verification=True) from error

    def _try_again(self, failure: ReadFailed) -> bool:
        """Begin anew, as the READ is over and writes no more. False: that has been done as often as
        is allowed.
        """
        if self.num_retries + 1 >= self._command.num_attempts:
            return False
        self.num_retries += 1
        logger.warning("pull %s begins anew: %s", self._command.pull_id, failure)
        self._reads.wait()
        self.stage = Stage.CONNECTING
        self._next_begin_s = self._next_heartbeat_s = self._next_checksums_s = float("inf")
        return True
