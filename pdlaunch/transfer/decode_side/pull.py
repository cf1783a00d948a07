"""One pull: the blocks of one prompt, from one or more holder ranks into blocks of this rank.

::

    every rank_pull (holder rank) proven ──> PullFinished(ok), and every holder is told of the end
    any rank_pull fails, time-out, cancel ── all are given up ──> PullFinished

A READ that is still pending when the pull fails goes on to own its destination blocks: the pull
says ``in_flight`` and lives until the handle has ended, however long that takes.
"""

from __future__ import annotations

from pdlaunch.errors import TransferError
from pdlaunch.protocol.ids import PullId
from pdlaunch.protocol.side_channel import LONGEST_WAIT_S
from pdlaunch.protocol.transfer import CancelPull, PullDrained, PullFinished, StartPull
from pdlaunch.transfer.channel.head_mapping import SourceRank
from pdlaunch.transfer.decode_side.links import PrefillLink, PullSetup
from pdlaunch.transfer.decode_side.peer_table import PeerTable
from pdlaunch.transfer.decode_side.rank_pull import RankPull
from pdlaunch.transfer.decode_side.read_plan import PullFailed


class Pull:
    """Drives one ``StartPull``; ends in one PullFinished, and one PullDrained where that said
    ``in_flight``.
    """

    def __init__(
        self, command: StartPull, links: list[tuple[SourceRank, PrefillLink]], setup: PullSetup
    ) -> None:
        """``links``: the holder ranks that this rank turns to, from ``map_sources``."""
        self.command = command
        self._setup = setup
        self._rank_pulls = [RankPull(command, source, link, setup) for source, link in links]
        self._started_s = setup.clock()
        """When the lease was known, where that is awaited."""
        self._deadline_s = (
            self._started_s + command.timeout_s + (LONGEST_WAIT_S if command.awaits else 0.0)
        )
        self._awaits = command.awaits
        self._finished = False
        self._draining = False

    @property
    def holds_blocks(self) -> bool:
        """Blocks of this rank belong to it."""
        return not self._finished or self._draining

    @property
    def closed(self) -> bool:
        """Nothing is left to do or to wait for."""
        return not self.holds_blocks and not any(
            rank_pull.owes_end for rank_pull in self._rank_pulls
        )

    @property
    def youngest_hashing_s(self) -> float | None:
        """Clock time at which checksums were asked for, latest, that are still being computed;
        None: none are.
        """
        since_s = [
            rank_pull.hashing_since_s for rank_pull in self._rank_pulls if not self._finished
        ]
        return max((at_s for at_s in since_s if at_s is not None), default=None)

    def next_deadline_s(self) -> float:
        """Clock time at which ``advance`` has something to do, pending READs and messages aside."""
        due_s = [rank_pull.next_deadline_s() for rank_pull in self._rank_pulls]
        return min(due_s) if self._finished else min(self._deadline_s, *due_s)

    def cancel(self) -> None:
        """Nobody wants the blocks any more."""
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
        for rank_pull in self._rank_pulls:
            rank_pull.advance()
        known_s = [
            rank_pull.lease_known_s
            for rank_pull in self._rank_pulls
            if rank_pull.lease_known_s is not None
        ]
        if self._awaits and known_s:
            self._awaits = False
            self._started_s, self._deadline_s = min(known_s), min(known_s) + self.command.timeout_s
        if self._setup.clock() >= self._deadline_s:
            where = ", ".join(
                f"{rank_pull.name} is {rank_pull.stage.name.lower()}"
                for rank_pull in self._rank_pulls
            )
            raise PullFailed(f"no end within {self._deadline_s - self._started_s:g} s; {where}")
        if all(rank_pull.is_proven for rank_pull in self._rank_pulls):
            for rank_pull in self._rank_pulls:
                rank_pull.end()
            self._finish(ok=True)

    def _fail(self, failure: PullFailed) -> None:
        for rank_pull in self._rank_pulls:
            rank_pull.give_up()
        self._draining = any(rank_pull.in_flight for rank_pull in self._rank_pulls)
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
        self._setup.emit(
            PullFinished(
                pull_id=self.command.pull_id,
                ok=ok,
                error=error,
                in_flight=self._draining,
                num_bytes=sum(rank_pull.num_bytes for rank_pull in self._rank_pulls) if ok else 0,
                seconds=self._setup.clock() - self._started_s,
                read_s=max(rank_pull.read_s for rank_pull in self._rank_pulls) if ok else 0.0,
                verification_failed=verification_failed
                or any(rank_pull.verification_failed for rank_pull in self._rank_pulls),
                late=late,
                num_retries=sum(rank_pull.num_retries for rank_pull in self._rank_pulls),
                first_tokens=next(
                    (
                        rank_pull.first_tokens
                        for rank_pull in self._rank_pulls
                        if rank_pull.first_tokens
                    ),
                    [],
                ),
            )
        )

    def _settle(self) -> None:
        for rank_pull in self._rank_pulls:
            rank_pull.settle()
        if self._draining and not any(rank_pull.in_flight for rank_pull in self._rank_pulls):
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
        """Blocks of this rank belong to a pull; else some only have to tell holders of their
        end.
        """
        return any(pull.holds_blocks for pull in self._pulls.values())

    @property
    def youngest_hashing_s(self) -> float | None:
        """Clock time at which checksums were asked for, latest, that are still being computed;
        None: none are.
        """
        since_s = [pull.youngest_hashing_s for pull in self._pulls.values()]
        return max((at_s for at_s in since_s if at_s is not None), default=None)

    def start(self, command: StartPull) -> None:
        """Begin a pull. The holder is found in the registry by its engine_id: the request's host
        and port are not trusted.
        """
        assert command.pull_id not in self._pulls
        try:
            links = self._peers.sources_of(command.remote.engine_id)
        except TransferError as error:
            self._setup.emit(PullFinished(pull_id=command.pull_id, ok=False, error=str(error)))
            return
        self._pulls[command.pull_id] = Pull(command, list(links), self._setup)

    def cancel(self, command: CancelPull) -> None:
        """Unknown pulls have ended already."""
        if (pull := self._pulls.get(command.pull_id)) is not None:
            pull.cancel()

    def advance(self) -> None:
        """Let every pull do what can be done now."""
        for pull in list(self._pulls.values()):
            pull.advance()
            if pull.closed:
                del self._pulls[pull.command.pull_id]

    def next_deadline_s(self) -> float:
        """Clock time at which ``advance`` has something to do, READs and messages aside."""
        return min((pull.next_deadline_s() for pull in self._pulls.values()), default=float("inf"))
