"""Keeps which pairs of ranks are proven and which are missing, and finds what joins their GPUs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from pdlaunch.launch.engines.plan import EngineKind
from pdlaunch.planning.plan import Plan
from pdlaunch.protocol.control import PairReady, PairSuspect


class Pairs:
    """Keeps the proofs of a launch.

    With different TP sizes only some ranks of two engines talk to each other, and the decode side
    knows which: each proof tells with how many ranks of that engine.
    """

    def __init__(self, plan: Plan, kind: EngineKind) -> None:
        self._kind = kind
        self.proven: dict[tuple[str, str], PairReady] = {}
        self._errors: dict[tuple[str, str], str] = {}
        self.use(plan)

    def use(self, plan: Plan) -> None:
        """Derive the pairs that are due from the processes of a plan."""
        self._due = [
            (process.name, engine)
            for process in plan.processes
            if self._kind.proves_pairs(process)
            for engine in plan.engines("prefill")
            if process.peers is None or engine in process.peers
        ]

    def add(self, pair: PairReady) -> None:
        self.proven[pair.local, pair.peer] = pair
        self._errors.pop((pair.local, pair.peer), None)

    def fail(self, local: str, peer: str, error: str) -> None:
        self._errors[local, peer] = error

    def suspect(self, pair: PairSuspect) -> bool:
        """Drop a proof; return False if it is gone or renewed already."""
        proof = self.proven.get((pair.local, pair.peer))
        if proof is None or proof.peer_incarnation != pair.peer_incarnation:
            return False
        del self.proven[pair.local, pair.peer]
        self.fail(pair.local, pair.peer, pair.error)
        return True

    def forget(self, name: str) -> None:
        """Drop all proofs of a dead process, as prover or as peer."""
        self.proven = {ends: pair for ends, pair in self.proven.items() if name not in ends}

    def missing(self, among: Iterable[str], of: Collection[str] | None = None) -> list[str]:
        """Return the unproven pairs between engines, in words with the last error.

        ``of``: pairs of these engines alone.
        """
        there = set(among)
        proven: dict[tuple[str, str], list[PairReady]] = defaultdict(list)
        for pair in self.proven.values():
            proven[pair.local, engine_of(pair.peer)].append(pair)
        errors = {(local, engine_of(peer)): error for (local, peer), error in self._errors.items()}
        return [
            _describe(local, engine, proven[local, engine], errors.get((local, engine), ""))
            for local, engine in self._due
            if {engine_of(local), engine} <= there
            and (of is None or engine_of(local) in of or engine in of)
            and not _is_connected(proven[local, engine])
        ]


def engine_of(process: str) -> str:
    """Return the engine of a process, whose name begins with the engine's."""
    return process.partition("/")[0]


def _is_connected(pairs: Sequence[PairReady]) -> bool:
    # Before the first proof nobody here knows how many ranks of the engine this one talks to.
    return bool(pairs) and len(pairs) >= max(pair.num_peers for pair in pairs)


def _describe(local: str, engine: str, pairs: Sequence[PairReady], error: str) -> str:
    what = (
        f"a path to only {len(pairs)} of {pairs[0].num_peers} ranks of" if pairs else "no path to"
    )
    return f"{local} has {what} {engine}" + (f": {error}" if error else "")
