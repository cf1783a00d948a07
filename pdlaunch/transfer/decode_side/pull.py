"""One pull: the blocks of one prompt, from one or more holder ranks into blocks of this rank.

::

    every branch (holder rank) proven ──> PullFinished(ok), and every holder is told of the end
    any branch fails, time-out, cancel ── all are given up ──> PullFinished

A READ that is still pending when the pull fails goes on to own its destination blocks: the pull
says ``in_flight`` and lives until the handle has ended, however long that takes.
"""

from __future__ import annotations

from pdlaunch.protocol.side_channel import LONGEST_WAIT_S
from pdlaunch.protocol.transfer import PullDrained, PullFinished, StartPull
from pdlaunch.transfer.channel.head_mapping import SourceRank
from pdlaunch.transfer.decode_side.branch import Branch
from pdlaunch.transfer.decode_side.holder_link import HolderLink, Puller
from pdlaunch.transfer.decode_side.read_plan import PullFailed


class Pull:
    """Drives one ``StartPull``; ends in one PullFinished, and one PullDrained where that said
    ``in_flight``.
    """

    def __init__(
        self, command: StartPull, links: list[tuple[SourceRank, HolderLink]], puller: Puller
    ) -> None:
        """``links``: the holder ranks that this rank turns to, from ``map_sources``."""
        self.command = command
        self._puller = puller
        self._branches = [Branch(command, source, link, puller) for source, link in links]
        self._started_s = puller.clock()
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
        return not self.holds_blocks and not any(branch.owes_end for branch in self._branches)

    @property
    def youngest_hashing_s(self) -> float | None:
        """Clock time at which checksums were asked for, latest, that are still being computed;
        None: none are.
        """
        since_s = [branch.hashing_since_s for branch in self._branches if not self._finished]
        return max((at_s for at_s in since_s if at_s is not None), default=None)

    def next_deadline_s(self) -> float:
        """Clock time at which ``advance`` has something to do, pending READs and messages aside."""
        due_s = [branch.next_deadline_s() for branch in self._branches]
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
        for branch in self._branches:
            branch.advance()
        known_s = [
            branch.lease_known_s for branch in self._branches if branch.lease_known_s is not None
        ]
        if self._awaits and known_s:
            self._awaits = False
            self._started_s, self._deadline_s = min(known_s), min(known_s) + self.command.timeout_s
        if self._puller.clock() >= self._deadline_s:
            where = ", ".join(
                f"{branch.name} is {branch.stage.name.lower()}" for branch in self._branches
            )
            raise PullFailed(f"no end within {self._deadline_s - self._started_s:g} s; {where}")
        if all(branch.is_proven for branch in self._branches):
            for branch in self._branches:
                branch.end()
            self._finish(ok=True)

    def _fail(self, failure: PullFailed) -> None:
        for branch in self._branches:
            branch.give_up()
        self._draining = any(branch.in_flight for branch in self._branches)
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
        self._puller.emit(
            PullFinished(
                pull_id=self.command.pull_id,
                ok=ok,
                error=error,
                in_flight=self._draining,
                num_bytes=sum(branch.num_bytes for branch in self._branches) if ok else 0,
                seconds=self._puller.clock() - self._started_s,
                read_s=max(branch.read_s for branch in self._branches) if ok else 0.0,
                verification_failed=verification_failed
                or any(branch.verification_failed for branch in self._branches),
                late=late,
                num_retries=sum(branch.num_retries for branch in self._branches),
                first_tokens=next(
                    (branch.first_tokens for branch in self._branches if branch.first_tokens), []
                ),
            )
        )

    def _settle(self) -> None:
        for branch in self._branches:
            branch.settle()
        if self._draining and not any(branch.in_flight for branch in self._branches):
            self._draining = False
            self._puller.emit(PullDrained(pull_id=self.command.pull_id))
