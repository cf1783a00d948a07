"""Pulls the blocks of prompts, each from one or more prefill ranks into blocks of this rank.

::

    every rank pull is proven ──> PullFinished(ok); every prefill rank is told of the end
    a rank pull fails, the deadline passes, cancel ──> all are given up ──> PullFinished

A READ that is pending when its pull fails still owns its destination blocks. The pull then says
``in_flight``, and lives until the READ has ended, however long that takes.
"""

from __future__ import annotations

import logging

from pdlaunch.errors import TransferError
from pdlaunch.observe.spans import SpanLog
from pdlaunch.protocol.ids import PullId
from pdlaunch.protocol.transfer import (
    CancelPull,
    PullDrained,
    PullFinished,
    StartPull,
    join_paths,
)
from pdlaunch.transfer.channel.head_mapping import SourceRank
from pdlaunch.transfer.decode_side.links import PrefillLink, PullSetup
from pdlaunch.transfer.decode_side.peer_table import PeerTable
from pdlaunch.transfer.decode_side.rank_pull import RankPull
from pdlaunch.transfer.decode_side.reads import PullFailed
from pdlaunch.transfer.instants import earliest, latest

logger = logging.getLogger(__name__)


class Pull:
    """Drives one ``StartPull``; ends in one PullFinished, and one PullDrained where that said
    ``in_flight``.
    """

    def __init__(
        self, command: StartPull, links: list[tuple[SourceRank, PrefillLink]], setup: PullSetup
    ) -> None:
        """``links`` are the prefill ranks that this rank turns to, from ``map_sources``."""
        self.command = command
        self._setup = setup
        self._log = SpanLog(setup.clock) if command.records_spans else None
        self._rank_pulls = [
            RankPull(command, source, link, setup, self._log) for source, link in links
        ]
        self._started_at = setup.clock()
        self._deadline_at = self._started_at + command.timeout_s
        self._finished = False
        self._draining = False

    @property
    def holds_blocks(self) -> bool:
        """Return whether blocks of this rank belong to the pull."""
        return not self._finished or self._draining

    @property
    def closed(self) -> bool:
        """Return whether nothing is left to do or to wait for."""
        return not self.holds_blocks and not any(pull.owes_end for pull in self._rank_pulls)

    @property
    def hashing_since_at(self) -> float | None:
        """Return when the latest of the checksums that are being computed were asked for."""
        if self._finished:
            return None
        return latest(pull.hashing_since_at for pull in self._rank_pulls)

    def next_deadline_at(self) -> float | None:
        """Return when ``advance`` has something to do, READs and messages aside."""
        due_at = [pull.next_deadline_at() for pull in self._rank_pulls]
        return earliest(due_at if self._finished else [self._deadline_at, *due_at])

    def cancel(self) -> None:
        """Give up: nobody wants the blocks any more."""
        if not self._finished:
            self._fail(PullFailed("cancelled"))

    def advance(self) -> None:
        """Do what can be done now; never waits."""
        if self._finished:
            self._settle()
            return
        try:
            self._step()
        except PullFailed as failure:
            self._fail(failure)

    def _step(self) -> None:
        for pull in self._rank_pulls:
            pull.advance()
        if self._setup.clock() >= self._deadline_at:
            where = ", ".join(
                f"{pull.name} is {pull.stage.name.lower()}" for pull in self._rank_pulls
            )
            raise PullFailed(f"no end within {self.command.timeout_s:g} s; {where}")
        if all(pull.is_proven for pull in self._rank_pulls):
            for pull in self._rank_pulls:
                pull.end()
            self._finish(ok=True)

    def _fail(self, failure: PullFailed) -> None:
        # First: no READ may begin once the engine knows of the end and gives the blocks to others.
        for pull in self._rank_pulls:
            pull.give_up()
        self._draining = any(pull.in_flight for pull in self._rank_pulls)
        self._finish(
            ok=False,
            error=str(failure),
            late=failure.late,
            verification_failed=failure.verification,
        )

    def _finish(
        self, *, ok: bool, error: str = "", late: bool = False, verification_failed: bool = False
    ) -> None:
        self._finished = True
        logger.debug(
            "pull of %s has ended: %s", self.command.request_id, error or "the blocks are proven"
        )
        self._setup.emit(
            PullFinished(
                pull_id=self.command.pull_id,
                ok=ok,
                error=error,
                in_flight=self._draining,
                num_bytes=sum(pull.num_bytes for pull in self._rank_pulls) if ok else 0,
                seconds=self._setup.clock() - self._started_at,
                read_s=max(pull.read_s for pull in self._rank_pulls) if ok else 0.0,
                # Names of ranks begin with that of their engine.
                prefill=self._rank_pulls[0].name.partition("/")[0] if ok else "",
                path=join_paths(pull.path for pull in self._rank_pulls) if ok else "",
                verification_failed=verification_failed
                or any(pull.verification_failed for pull in self._rank_pulls),
                late=late,
                num_retries=sum(pull.num_retries for pull in self._rank_pulls),
                reports={} if self._log is None else {self._setup.tp_rank: self._log.report()},
            )
        )

    def _settle(self) -> None:
        for pull in self._rank_pulls:
            pull.settle()
        if self._draining and not any(pull.in_flight for pull in self._rank_pulls):
            self._draining = False
            self._setup.emit(PullDrained(pull_id=self.command.pull_id))


class PullTable:
    """Starts, drives and cancels pulls."""

    def __init__(self, setup: PullSetup, peers: PeerTable) -> None:
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
        return latest(pull.hashing_since_at for pull in self._pulls.values())

    def start(self, command: StartPull) -> None:
        """Begin a pull. The registry shows its prefill ranks by their engine_id: the host and port
        of the request are not trusted.
        """
        assert command.pull_id not in self._pulls
        try:
            links = self._peers.sources_of(command.remote.engine_id)
        except TransferError as error:
            self._setup.emit(PullFinished(pull_id=command.pull_id, ok=False, error=str(error)))
            return
        logger.debug(
            "pull of %s begins: %d blocks", command.request_id, sum(map(len, command.block_ids))
        )
        self._pulls[command.pull_id] = Pull(command, list(links), self._setup)

    def cancel(self, command: CancelPull) -> None:
        """Cancel a pull. Unknown pulls have ended already."""
        if (pull := self._pulls.get(command.pull_id)) is not None:
            pull.cancel()

    def advance(self) -> None:
        """Let every pull do what can be done now."""
        for pull in list(self._pulls.values()):
            pull.advance()
            if pull.closed:
                del self._pulls[pull.command.pull_id]

    def next_deadline_at(self) -> float | None:
        """Return when ``advance`` has something to do, READs and messages aside."""
        return earliest(pull.next_deadline_at() for pull in self._pulls.values())
