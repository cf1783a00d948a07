"""Keeps what the supervisor tells every process: who lives where, and which pairs of ranks are
proven.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set

from pdlaunch.launch.engines.kind import EngineKind
from pdlaunch.launch.instance import Instance
from pdlaunch.planning.plan import Plan
from pdlaunch.protocol.control import EndReason, Entry, PairReady, PairSuspect, Registry


class RegistryVersions:
    """Makes the versions of the registry: a new one with every change, and never without one."""

    def __init__(self) -> None:
        self._current = Registry(version=0, entries=[], serving=False)

    @property
    def current(self) -> Registry:
        return self._current

    def update(
        self,
        instances: Iterable[Instance],
        pairs: Sequence[PairReady] = (),
        *,
        serving: bool,
        ends: Mapping[str, Mapping[EndReason, int]] | None = None,
    ) -> bool:
        """Take in the state of all instances, of pairs and of the launch. ``ends``: as in Registry;
        who ends leaves the entries, too.

        Returns True when the registry has changed and must be sent.
        """
        entries: list[Entry] = [
            entry for instance in instances if (entry := instance.entry()) is not None
        ]
        current = self._current
        if (entries, list(pairs), serving) == (current.entries, current.pairs, current.serving):
            return False
        self._current = Registry(
            version=current.version + 1,
            entries=entries,
            serving=serving,
            pairs=list(pairs),
            ends={name: dict(counts) for name, counts in (ends or {}).items()},
        )
        return True


class Pairs:
    """Keeps which pairs of a launch are proven and which are missing.

    With different TP sizes only some ranks of two engines talk to each other, and the decode side
    knows which: each pair tells with how many ranks of that engine. No pairs are due while a role
    has no engine.
    """

    def __init__(self, plan: Plan, kind: EngineKind) -> None:
        self._kind = kind
        self.use(plan)
        self._given_up: set[str] = set()
        self._proven: dict[tuple[str, str], PairReady] = {}
        self._errors: dict[tuple[str, str], str] = {}

    def use(self, plan: Plan) -> None:
        """Take the processes that there are from now on."""
        self._engine_of = {p.name: p.engine for p in plan.processes if p.role == "prefill"}
        self._due = [
            (process.name, engine)
            for process in plan.processes
            if self._kind.proves_pairs(process)
            for engine in plan.engines("prefill")
            if process.peers is None or engine in process.peers
        ]

    def add(self, pair: PairReady) -> None:
        self._proven[pair.local, pair.peer] = pair
        self._errors.pop((pair.local, pair.peer), None)

    def fail(self, local: str, peer: str, error: str) -> None:
        self._errors[local, peer] = error

    def suspect(self, pair: PairSuspect) -> bool:
        """Drop the proof that is in doubt; False when it is gone or renewed already."""
        proof = self._proven.get((pair.local, pair.peer))
        if proof is None or proof.peer_incarnation != pair.peer_incarnation:
            return False
        del self._proven[pair.local, pair.peer]
        self.fail(pair.local, pair.peer, pair.error)
        return True

    def forget(self, name: str) -> None:
        """Drop what a dead process has proven, and what was proven about it."""
        for pair in [pair for pair in self._proven if name in pair]:
            del self._proven[pair]

    def give_up(self, engine: str) -> None:
        """Stop waiting for the pairs of this engine, until it is tried again."""
        self._given_up.add(engine)

    def try_again(self, engine: str) -> None:
        self._given_up.discard(engine)

    def missing_of(self, engine: str, others: Set[str]) -> list[str]:
        """Return the pairs that are due between an engine and others, as ``missing`` does."""
        return self._describe_missing(
            pair
            for pair in self._due
            if engine in (ends := (_engine_of(pair[0]), pair[1])) and others >= set(ends)
        )

    def proven(self) -> list[PairReady]:
        return list(self._proven.values())

    def missing(self) -> list[str]:
        """Return the pairs that are due, each in words with the last error."""
        return self._describe_missing(
            (rank, engine)
            for rank, engine in self._due
            if self._given_up.isdisjoint((_engine_of(rank), engine))
        )

    def _describe_missing(self, due: Iterable[tuple[str, str]]) -> list[str]:
        proven: dict[tuple[str, str], list[PairReady]] = defaultdict(list)
        for pair in self._proven.values():
            proven[pair.local, self._engine_of.get(pair.peer, "")].append(pair)
        errors = {
            (local, self._engine_of.get(peer, "")): error
            for (local, peer), error in self._errors.items()
        }
        return [
            _describe(rank, engine, proven[rank, engine], errors.get((rank, engine), ""))
            for rank, engine in due
            if not _is_connected(proven[rank, engine])
        ]


def _engine_of(process: str) -> str:
    """Return the engine of a process, whose name begins with the engine's."""
    return process.partition("/")[0]


def _is_connected(pairs: Sequence[PairReady]) -> bool:
    # Before the first proof nobody here knows how many ranks of the engine this one talks to.
    return bool(pairs) and len(pairs) >= max(pair.num_peers for pair in pairs)


def _describe(local: str, engine: str, pairs: Sequence[PairReady], error: str) -> str:
    """Say what is missing between a rank and an engine, with the last error."""
    what = (
        f"a path to only {len(pairs)} of {pairs[0].num_peers} ranks of" if pairs else "no path to"
    )
    return f"{local} has {what} {engine}" + (f": {error}" if error else "")
