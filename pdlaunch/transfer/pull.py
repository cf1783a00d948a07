"""One pull: the blocks of one prompt, from one or more holder ranks into blocks of this rank.

::

    each branch (holder rank):   connecting ── begin ──> beginning ── hashes equal ──> reading ── checksums equal ──> proven
    all branches proven:         ending ── held ──> ended
    all branches ended:          PullFinished(ok)

A branch that fails fails the pull. A READ that is still pending then goes on to own its destination blocks: the pull says
``in_flight`` and lives until the handle has ended, however long that takes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal, Protocol

from pdlaunch.errors import TransferError, VerificationError
from pdlaunch.protocol.side_channel import (
    Geometry,
    Heartbeat,
    HeartbeatReply,
    PullBegin,
    PullEnd,
    PullEndReply,
    PullReply,
    Refused,
    ToHolder,
    ToPuller,
)
from pdlaunch.protocol.transfer import PullDrained, PullFinished, StartPull
from pdlaunch.transfer.checksum import BlockHasher
from pdlaunch.transfer.connector import BlockRead, ReadHandle, ReadState
from pdlaunch.transfer.mapping import Source

logger = logging.getLogger(__name__)

HEARTBEATS_A_LEASE = 4

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

    def release(self, handle: ReadHandle) -> None: ...

    def reconnect(self) -> None:
        """A READ has failed: the connection is not to be trusted."""


class PullFailed(TransferError):
    """Why a pull cannot go on."""

    def __init__(self, message: str, *, retryable: bool, verification: bool = False, late: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.verification = verification
        self.late = late


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


class _Stage(Enum):
    CONNECTING = auto()
    BEGINNING = auto()
    READING = auto()
    PROVEN = auto()
    ENDING = auto()
    ENDED = auto()


_HELD_OPEN = frozenset({_Stage.BEGINNING, _Stage.READING, _Stage.PROVEN})
"""The holder keeps its lease for this branch."""


@dataclass(slots=True)
class _Branch:
    """The share of one holder rank."""

    source: Source
    link: HolderLink
    stage: _Stage = _Stage.CONNECTING
    handle: ReadHandle | None = None
    read: BlockRead | None = None
    checksums: list[list[int]] = field(default_factory=list)
    """Expected, by block and head of ``read``."""
    next_heartbeat_s: float = float("inf")
    heartbeat_s: float = float("inf")
    """Seconds between two."""


class Pull:
    """Drives one ``StartPull``; ends in one PullFinished, and one PullDrained where that said ``in_flight``."""

    def __init__(self, command: StartPull, links: list[tuple[Source, HolderLink]], puller: Puller) -> None:
        """``links``: the holder ranks that this rank turns to, from ``map_sources``."""
        self.command = command
        self._puller = puller
        self._branches = [_Branch(source, link) for source, link in links]
        self._started_s = puller.clock()
        self._deadline_s = self._started_s + command.timeout_s
        self._finished = False
        self._draining: list[tuple[HolderLink, ReadHandle]] = []
        self._failure: PullFailed | None = None
        self._num_bytes = 0
        self._departed = False
        """A holder had died before its share was proven."""

    @property
    def closed(self) -> bool:
        """Nothing is left to do or to wait for."""
        return self._finished and not self._draining

    def next_deadline_s(self) -> float:
        """Clock time at which ``advance`` has something to do, pending READs and messages aside."""
        if self._finished:
            return float("inf")
        return min(self._deadline_s, *(branch.next_heartbeat_s for branch in self._branches))

    def cancel(self) -> None:
        """Nobody wants the blocks any more."""
        if not self._finished:
            self._fail(PullFailed("cancelled", retryable=False))

    def advance(self) -> None:
        """Do what can be done now; never waits."""
        if self._finished:
            self._drain()
            return
        try:
            self._step()
        except PullFailed as failure:
            self._fail(failure)

    def _step(self) -> None:
        if self._failure is not None:
            raise self._failure
        for branch in self._branches:
            self._advance_branch(branch)
        if self._puller.clock() >= self._deadline_s:
            raise PullFailed(f"no end within {self.command.timeout_s:g} s; {self._where()}", retryable=True)
        if all(branch.stage is _Stage.PROVEN for branch in self._branches):
            for branch in self._branches:
                self._end_branch(branch)
        if all(branch.stage is _Stage.ENDED for branch in self._branches):
            self._succeed()

    def _advance_branch(self, branch: _Branch) -> None:
        link = branch.link
        if branch.stage is _Stage.ENDED:
            return
        if link.status in ("lost", "incompatible"):
            raise PullFailed(f"{link.name}: {link.error}", retryable=False)
        if branch.stage is not _Stage.CONNECTING and link.status != "ready":
            raise PullFailed(f"{link.name} was disconnected: {link.error}", retryable=True)
        if branch.stage is _Stage.CONNECTING and link.status == "ready":
            self._begin_branch(branch)
        elif branch.stage is _Stage.READING:
            self._poll_read(branch)
        if self._puller.clock() >= branch.next_heartbeat_s:
            self._heartbeat(branch)

    def _begin_branch(self, branch: _Branch) -> None:
        remote, source = self.command.remote, branch.source
        branch.stage = _Stage.BEGINNING
        branch.link.ask(
            lambda call_id: PullBegin(
                call_id=call_id,
                engine_id=remote.engine_id,
                request_id=remote.request_id,
                reader=self._reader,
                num_pullers=source.num_pullers,
            ),
            lambda reply: self._on_reply(branch, reply),
        )

    def _end_branch(self, branch: _Branch) -> None:
        branch.stage = _Stage.ENDING
        self._send_end(branch, again=False, on_reply=lambda reply: self._on_reply(branch, reply))

    def _heartbeat(self, branch: _Branch) -> None:
        """One at a time: the next is due only after the answer."""
        branch.next_heartbeat_s = float("inf")
        remote = self.command.remote
        branch.link.ask(
            lambda call_id: Heartbeat(
                call_id=call_id, engine_id=remote.engine_id, request_id=remote.request_id, reader=self._reader
            ),
            lambda reply: self._on_reply(branch, reply),
        )

    def _on_reply(self, branch: _Branch, reply: ToPuller) -> None:
        """Errors wait for ``advance``, which has one place for them."""
        if self._finished or self._failure is not None:
            return
        try:
            self._handle(branch, reply)
        except PullFailed as failure:
            self._failure = failure

    def _handle(self, branch: _Branch, reply: ToPuller) -> None:
        match reply:
            case PullReply() if branch.stage is _Stage.BEGINNING:
                branch.heartbeat_s = reply.lease_s / HEARTBEATS_A_LEASE
                branch.next_heartbeat_s = self._puller.clock() + branch.heartbeat_s
                self._start_read(branch, reply)
            case HeartbeatReply():
                if branch.stage in _HELD_OPEN:
                    branch.next_heartbeat_s = self._puller.clock() + branch.heartbeat_s
            case PullEndReply() if branch.stage is _Stage.ENDING:
                if not reply.held:
                    raise PullFailed(
                        f"{branch.link.name}: the lease did not hold throughout the pull", retryable=False, late=True
                    )
                branch.stage = _Stage.ENDED
                self._departed |= branch.link.departed
            case Refused():
                late = branch.stage is not _Stage.BEGINNING
                raise PullFailed(f"{branch.link.name} refused: {reply.reason}", retryable=False, late=late)
            case _:
                raise PullFailed(f"{branch.link.name}: unexpected {type(reply).__name__}", retryable=False)

    def _start_read(self, branch: _Branch, reply: PullReply) -> None:
        self._check_hashes(branch.link, reply)
        branch.read, branch.checksums = self._plan_read(branch, reply)
        if not branch.read.local_blocks or not branch.read.local_heads:
            branch.stage = _Stage.PROVEN
            return
        try:
            branch.handle = branch.link.start_read(branch.read)
        except TransferError as error:
            branch.link.reconnect()
            raise PullFailed(f"{branch.link.name}: {error}", retryable=True) from None
        branch.stage = _Stage.READING
        self._poll_read(branch)

    def _check_hashes(self, link: HolderLink, reply: PullReply) -> None:
        """The holder's blocks were computed for this very prompt."""
        ours = self.command.block_hashes
        if reply.num_tokens < self.command.num_tokens or reply.block_hashes[: len(ours)] != ours:
            pairs = zip(ours, reply.block_hashes, strict=False)
            first = next((index for index, pair in enumerate(pairs) if pair[0] != pair[1]), len(reply.block_hashes))
            raise PullFailed(
                f"{link.name}: token hashes of request {self.command.remote.request_id} differ from block {first} on "
                f"({self.command.num_tokens} tokens here, {reply.num_tokens} there)",
                retryable=False,
                verification=True,
            )

    def _plan_read(self, branch: _Branch, reply: PullReply) -> tuple[BlockRead, list[list[int]]]:
        command, link = self.command, branch.link
        if len(reply.groups) != len(command.block_ids):
            raise PullFailed(
                f"{link.name} has {len(reply.groups)} KV cache groups, {len(command.block_ids)} here", retryable=False
            )
        heads, geometry = branch.source.heads, link.geometry
        remote_heads = range(heads.start - geometry.first_kv_head, heads.stop - geometry.first_kv_head)
        local_heads = range(heads.start - self._puller.first_kv_head, heads.stop - self._puller.first_kv_head)
        local: list[int] = []
        remote: list[int] = []
        checksums: list[list[int]] = []
        for index, (block_ids, first, group) in enumerate(
            zip(command.block_ids, command.first_block_index, reply.groups, strict=True)
        ):
            if not block_ids:
                continue
            start = first - group.first_block_index
            wanted = slice(start, start + len(block_ids))
            found = group.block_ids[wanted] if start >= 0 else []
            if len(found) != len(block_ids) or first + len(block_ids) > len(command.block_hashes):
                raise PullFailed(f"{link.name} does not hold all blocks of group {index} from {first} on", retryable=False)
            local += block_ids
            remote += found
            checksums += [row[remote_heads.start : remote_heads.stop] for row in (group.checksums or [])[wanted]]
        if remote and not 0 <= min(remote) <= max(remote) < geometry.num_blocks:
            raise PullFailed(f"{link.name} named a block outside of its {geometry.num_blocks}", retryable=False)
        read = BlockRead(
            local_blocks=local,
            remote_blocks=remote,
            local_heads=local_heads,
            remote_heads=remote_heads,
            request_id=command.remote.request_id,
            reader=self._reader,
            digest=command.block_hashes[-1].hex(),
        )
        return read, checksums

    def _poll_read(self, branch: _Branch) -> None:
        assert branch.handle is not None
        state = branch.link.poll(branch.handle)
        if state == "pending":
            return
        branch.link.release(branch.handle)
        branch.handle = None
        if state == "failed":
            branch.link.reconnect()
            raise PullFailed(f"READ from {branch.link.name} failed", retryable=True)
        self._verify(branch)
        branch.stage = _Stage.PROVEN

    def _verify(self, branch: _Branch) -> None:
        """Compare the checksums of what has arrived with what the holder stated when it granted the lease."""
        read, hasher = branch.read, self._puller.hasher
        assert read is not None
        self._num_bytes += len(read.local_blocks) * len(read.local_heads) * self._puller.head_bytes
        if hasher is None:
            return
        try:
            _compare(hasher, read, branch.checksums)
        except VerificationError as error:
            logger.error("pull %s from %s: %s", self.command.pull_id, branch.link.name, error)
            raise PullFailed(f"{branch.link.name}: {error}", retryable=True, verification=True) from None

    def _succeed(self) -> None:
        self._finished = True
        self._puller.emit(
            PullFinished(
                pull_id=self.command.pull_id,
                ok=True,
                num_bytes=self._num_bytes,
                seconds=self._elapsed_s(),
                departed=self._departed,
            )
        )

    def _fail(self, failure: PullFailed) -> None:
        self._finished = True
        again = failure.retryable and not self.command.last_attempt
        for branch in self._branches:
            if branch.stage is _Stage.CONNECTING and branch.link.status == "ready" and not again:
                # Over before it began: the holder learns that this reader has had its share, and need not wait for the deadline.
                self._begin_branch(branch)
            if branch.stage in _HELD_OPEN and branch.link.status == "ready":
                self._send_end(branch, again=again, on_reply=None)
            if branch.handle is not None:
                self._draining.append((branch.link, branch.handle))
        self._release_ended()
        self._puller.emit(
            PullFinished(
                pull_id=self.command.pull_id,
                ok=False,
                error=str(failure),
                retryable=failure.retryable,
                in_flight=bool(self._draining),
                seconds=self._elapsed_s(),
                verification_failed=failure.verification,
                late=failure.late,
            )
        )

    def _drain(self) -> None:
        if not self._draining:
            return
        self._release_ended()
        if not self._draining:
            self._puller.emit(PullDrained(pull_id=self.command.pull_id))

    def _release_ended(self) -> None:
        pending = []
        for link, handle in self._draining:
            if link.poll(handle) == "pending":
                pending.append((link, handle))
            else:
                link.release(handle)
        self._draining = pending

    def _send_end(self, branch: _Branch, *, again: bool, on_reply: Callable[[ToPuller], None] | None) -> None:
        remote = self.command.remote
        branch.link.ask(
            lambda call_id: PullEnd(
                call_id=call_id, engine_id=remote.engine_id, request_id=remote.request_id, reader=self._reader, again=again
            ),
            on_reply,
        )

    @property
    def _reader(self) -> str:
        """Unique over engines, ranks, choices and attempts; of bounded length, whatever the request's id is."""
        pull_id = hashlib.sha256(self.command.pull_id.encode()).hexdigest()
        return f"{self._puller.engine_id}/{self._puller.tp_rank}/{pull_id}"

    def _elapsed_s(self) -> float:
        return self._puller.clock() - self._started_s

    def _where(self) -> str:
        return ", ".join(f"{branch.link.name} is {branch.stage.name.lower()}" for branch in self._branches)


def _compare(hasher: BlockHasher, read: BlockRead, expected: list[list[int]]) -> None:
    """Raises VerificationError that names the first block and head that differ."""
    if len(expected) != len(read.local_blocks):
        raise VerificationError("the holder stated no checksums")
    found = hasher.checksums(read.local_blocks, slice(read.local_heads.start, read.local_heads.stop))
    for row, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours != theirs:
            head = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
            raise VerificationError(
                f"checksum of KV head {read.local_heads[head]} differs: block {read.remote_blocks[row]} there, "
                f"block {read.local_blocks[row]} here"
            )
