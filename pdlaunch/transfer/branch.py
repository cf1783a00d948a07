"""The share of a pull that one holder rank has.

::

    connecting ─ begin ─> beginning ─ hashes equal ─> reading ─> verifying ─ equal ─> proven ─ all are ─> ended
       ▲  ▲                   │                          │           │
       │  └── disconnected ───┘                          │           │
       └────── READ failed, or wrong bytes: once more ───┴───────────┘
    ended, or the pull has failed, here or elsewhere: the holder is told as soon as it can be reached

A lease has held throughout the READ when the READ is over before the lease can be: the holder says how many seconds are left when
it answers, which is after it was asked, and never ends it before while the pull is open. So nobody has to be asked afterwards.

A READ that failed or brought wrong bytes is repeated under the same lease, into the same blocks: it is over and writes no more.
So other branches, and other ranks, need not pull again what they have proven.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Literal, Protocol

from pdlaunch.errors import TransferError, VerificationError
from pdlaunch.protocol.side_channel import (
    Geometry,
    Heartbeat,
    HeartbeatReply,
    PullBegin,
    PullEnd,
    PullReply,
    Refused,
    ToHolder,
    ToPuller,
)
from pdlaunch.protocol.transfer import PullDrained, PullFinished, StartPull
from pdlaunch.transfer.checksum import BlockHasher
from pdlaunch.transfer.connector import BlockRead, ReadHandle, ReadState
from pdlaunch.transfer.mapping import Source
from pdlaunch.transfer.read_plan import Proof, PullFailed, ReadPlan, check_hashes, plan_read

logger = logging.getLogger(__name__)

HEARTBEATS_A_LEASE = 4
REPEAT_S = 5.0
"""Until a pull_begin without an answer is asked again: a connection between two hosts may break unnoticed."""

LinkStatus = Literal["connecting", "ready", "lost", "incompatible"]


class HolderLink(Protocol):
    """What a pull needs of a holder rank."""

    name: str
    error: str
    """Why it is not ready."""

    @property
    def status(self) -> LinkStatus: ...

    @property
    def departed(self) -> bool:
        """Ready, and dead: what it has left answers."""

    @property
    def geometry(self) -> Geometry:
        """Once ready."""

    def ask(self, build: Callable[[int], ToHolder], on_reply: Callable[[ToPuller], None] | None) -> None:
        """Send what ``build`` makes of a fresh call_id; ``on_reply`` gets the answer, if one comes."""

    def start_read(self, read: BlockRead) -> ReadHandle: ...

    def poll(self, handle: ReadHandle) -> ReadState: ...

    def num_landed(self, handle: ReadHandle) -> int: ...

    def read_s(self, handle: ReadHandle) -> float: ...

    def release(self, handle: ReadHandle) -> None: ...

    def reconnect(self) -> None:
        """A READ has failed: the connection is not to be trusted."""


@dataclass(frozen=True, slots=True)
class Puller:
    """This rank's side of all its pulls."""

    engine_id: str
    tp_rank: int
    first_kv_head: int
    head_bytes: int
    hasher: BlockHasher | None
    """None when ``kv_transfer.verify`` is off."""
    clock: Callable[[], float]
    emit: Callable[[PullFinished | PullDrained], None]

    def reader(self, pull_id: str) -> str:
        """Unique over engines, ranks and choices; of bounded length, whatever the request's id is."""
        return f"{self.engine_id}/{self.tp_rank}/{hashlib.sha256(pull_id.encode()).hexdigest()}"


class Stage(Enum):
    CONNECTING = auto()
    BEGINNING = auto()
    READING = auto()
    VERIFYING = auto()
    PROVEN = auto()
    ENDED = auto()


class Branch:
    """Talks to one holder rank and reads from it. The holder learns of the end, however the pull ends."""

    def __init__(self, command: StartPull, source: Source, link: HolderLink, puller: Puller) -> None:
        self.name = link.name
        self.stage = Stage.CONNECTING
        self.num_bytes = 0
        self.read_s = 0.0
        """Of the last READ, as exactly as the connector knows."""
        self.num_retries = 0
        self.verification_failed = False
        self.departed = False
        """The holder had died before the end."""
        self._command = command
        self._source = source
        self._link = link
        self._puller = puller
        self._reader = puller.reader(command.pull_id)
        self._handle: ReadHandle | None = None
        self._plan: ReadPlan | None = None
        self._proof: Proof | None = None
        """None when ``kv_transfer.verify`` is off."""
        self._hashing_since_s = 0.0
        self._held_until_s = 0.0
        """Clock time until which the lease is known to hold."""
        self._heartbeat_s = float("inf")
        """Seconds between two."""
        self._next_heartbeat_s = float("inf")
        self._next_begin_s = float("inf")
        """When pull_begin is asked again."""
        self._failure: PullFailed | None = None
        """Of an answer; ``advance`` is the one place for failures."""
        self._given_up = False
        self._owes_until_s: float | None = None
        """It is over, and the holder does not know yet: how long it is tried to tell it."""

    @property
    def is_proven(self) -> bool:
        """The blocks are here and right."""
        return self.stage in (Stage.PROVEN, Stage.ENDED)

    @property
    def in_flight(self) -> bool:
        """A READ may still write to the blocks."""
        return self._handle is not None

    @property
    def hashing_since_s(self) -> float | None:
        """Clock time at which checksums were asked for that are still being computed."""
        return self._hashing_since_s if self.stage is Stage.VERIFYING else None

    @property
    def owes_end(self) -> bool:
        """It is over, and the holder does not know yet."""
        return self._owes_until_s is not None

    def next_deadline_s(self) -> float:
        """Clock time at which there is something to do, READs and messages aside."""
        if self._owes_until_s is not None:
            return self._owes_until_s
        if self._link.status != "ready":
            return float("inf")
        return min(self._next_heartbeat_s, self._next_begin_s) if self.stage is Stage.BEGINNING else self._next_heartbeat_s

    def advance(self) -> None:
        """Do what can be done now; never waits. Raises PullFailed."""
        if self._failure is not None:
            raise self._failure
        if self.stage is Stage.ENDED:
            return
        if self._link.status in ("lost", "incompatible"):
            raise PullFailed(f"{self.name}: {self._link.error}")
        if self.stage is Stage.READING:
            self._poll_read()
        elif self.stage is Stage.VERIFYING:
            self._poll_checksums()
        if self._link.status != "ready":
            self._on_disconnected()
        elif self.stage is Stage.CONNECTING or (self.stage is Stage.BEGINNING and self._puller.clock() >= self._next_begin_s):
            self._begin()
        elif self._puller.clock() >= self._next_heartbeat_s:
            self._heartbeat()

    def end(self) -> None:
        """All branches are proven, the pull is done: as ``give_up``."""
        self.stage = Stage.ENDED
        self.departed = self._link.departed
        self.give_up()

    def give_up(self) -> None:
        """The pull is over: the holder need not wait for this reader any more. Then ``settle`` until nothing is left.

        The blocks may belong to somebody else from now on, but for a READ that is in flight: no other may begin.
        """
        self._given_up = True
        if self._link.status != "ready":
            self._on_disconnected()
        self._owes_until_s = self._puller.clock() + self._command.timeout_s
        self._next_heartbeat_s = float("inf")
        self.settle()

    def settle(self) -> None:
        """It is over: tell the holder once it can be told, and release the READ once that is over too."""
        if self._owes_until_s is not None:
            self._settle_end(self._owes_until_s)
        if self._handle is not None and self._link.poll(self._handle) != "pending":
            self._release()

    def _settle_end(self, owes_until_s: float) -> None:
        status = self._link.status
        if status == "ready":
            if self.stage is Stage.CONNECTING:
                # A reader's share of the lease ends only when it has begun.
                self._send_begin(None)
            self._send_end()
        if status != "connecting" or self._puller.clock() >= owes_until_s:
            self._owes_until_s = None

    def _on_disconnected(self) -> None:
        """Answers that were awaited do not come any more."""
        if self.stage is Stage.BEGINNING:
            self.stage = Stage.CONNECTING
        if self.stage is not Stage.CONNECTING:
            self._next_heartbeat_s = self._puller.clock()

    def _begin(self) -> None:
        now_s = self._puller.clock()
        self.stage, self._next_begin_s = Stage.BEGINNING, now_s + REPEAT_S
        self._send_begin(partial(self._on_reply, now_s))

    def _heartbeat(self) -> None:
        """The next is due as long after this one, or after its answer."""
        self._next_heartbeat_s = self._puller.clock() + self._heartbeat_s
        remote, reader = self._command.remote, self._reader
        self._link.ask(
            lambda call_id: Heartbeat(call_id=call_id, engine_id=remote.engine_id, request_id=remote.request_id, reader=reader),
            partial(self._on_reply, self._puller.clock()),
        )

    def _send_begin(self, on_reply: Callable[[ToPuller], None] | None) -> None:
        remote, reader, num_pullers = self._command.remote, self._reader, self._source.num_pullers
        self._link.ask(
            lambda call_id: PullBegin(
                call_id=call_id,
                engine_id=remote.engine_id,
                request_id=remote.request_id,
                reader=reader,
                num_pullers=num_pullers,
            ),
            on_reply,
        )

    def _send_end(self) -> None:
        remote, reader = self._command.remote, self._reader
        self._link.ask(
            lambda call_id: PullEnd(call_id=call_id, engine_id=remote.engine_id, request_id=remote.request_id, reader=reader),
            lambda _: None,  # its ledger is told when the holder dies before it has answered
        )

    def _on_reply(self, asked_s: float, reply: ToPuller) -> None:
        """``asked_s``: when the question was sent; the lease has at least the stated seconds from then on."""
        if self._given_up or self._failure is not None:
            return
        try:
            self._handle_reply(asked_s, reply)
        except PullFailed as failure:
            self._failure = failure

    def _handle_reply(self, asked_s: float, reply: ToPuller) -> None:
        match reply:
            case PullReply() if self.stage is Stage.BEGINNING:
                self._held_until_s = asked_s + reply.lease_s
                self._heartbeat_s = reply.lease_s / HEARTBEATS_A_LEASE
                self._next_heartbeat_s = self._puller.clock() + self._heartbeat_s
                self._start_read(reply)
            case PullReply():
                return  # to a pull_begin that was repeated
            case HeartbeatReply():
                if self.stage in (Stage.BEGINNING, Stage.READING, Stage.VERIFYING, Stage.PROVEN):
                    self._held_until_s = asked_s + reply.lease_s
                    self._next_heartbeat_s = self._puller.clock() + self._heartbeat_s
            case Refused():
                late = self.stage is not Stage.BEGINNING or self.num_retries > 0
                raise PullFailed(f"{self.name} refused: {reply.reason}", late=late)
            case _:
                raise PullFailed(f"{self.name}: unexpected {type(reply).__name__}")

    def _start_read(self, reply: PullReply) -> None:
        check_hashes(self._command, reply, self.name)
        self._plan = plan_read(
            self._command,
            reply,
            self._link.geometry,
            heads=self._source.heads,
            first_local_head=self._puller.first_kv_head,
            holder=self.name,
            reader=self._reader,
        )
        self._proof = None if self._puller.hasher is None else Proof(self._plan, self._puller.hasher)
        if self._plan.is_empty:
            self.stage = Stage.PROVEN
            return
        try:
            self._handle = self._link.start_read(self._plan.read)
        except TransferError as error:
            self._link.reconnect()
            self._try_again(PullFailed(f"{self.name}: {error}"))
            return
        self.stage = Stage.READING
        self._poll_read()

    def _poll_read(self) -> None:
        assert self._handle is not None
        state = self._link.poll(self._handle)
        if state == "pending":
            if self._proof is not None:
                self._proof.hash_until(self._link.num_landed(self._handle))
            return
        ended_s = self._puller.clock()
        if state == "done":
            self.read_s = self._link.read_s(self._handle)
        self._release()
        if state == "failed":
            self._link.reconnect()
            self._try_again(PullFailed(f"READ from {self.name} failed"))
            return
        if ended_s >= self._held_until_s:
            raise PullFailed(f"{self.name}: the lease did not hold throughout the READ", late=True)
        self._verify()

    def _verify(self) -> None:
        """Have the rest of the checksums computed."""
        assert self._plan is not None
        read = self._plan.read
        self.num_bytes = len(read.local_blocks) * len(read.local_heads) * self._puller.head_bytes
        if self._proof is None:
            self.stage = Stage.PROVEN
            return
        self._proof.hash_until(len(read.local_blocks))
        self.stage, self._hashing_since_s = Stage.VERIFYING, self._puller.clock()
        self._poll_checksums()

    def _poll_checksums(self) -> None:
        """Compare them, once they are there, with what the holder stated when it granted the lease."""
        assert self._proof is not None
        if not self._proof.ready():
            return
        try:
            self._proof.check()
        except VerificationError as error:
            self.verification_failed = True
            logger.error("pull %s from %s: %s", self._command.pull_id, self.name, error)
            self._try_again(PullFailed(f"{self.name}: {error}", verification=True))
            return
        self.stage = Stage.PROVEN

    def _try_again(self, failure: PullFailed) -> None:
        """The READ is over and writes no more: begin anew, as often as is allowed. Raises the failure else."""
        if self.num_retries + 1 >= self._command.num_attempts:
            raise failure
        self.num_retries += 1
        logger.warning("pull %s begins anew: %s", self._command.pull_id, failure)
        self.stage = Stage.CONNECTING
        self._next_heartbeat_s = float("inf")

    def _release(self) -> None:
        assert self._handle is not None
        self._link.release(self._handle)
        self._handle = None
