"""Tracks which pairs of ranks are proven, and which proofs are missing."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from pdlaunch.launch.engines.plan import EngineKind
from pdlaunch.planning.plan import Plan
from pdlaunch.protocol.control import PairReady, PairSuspect


class Pairs:
    """Holds the proofs of a launch.

    With different TP sizes, a decode rank pulls from only some ranks of a prefill engine. Each
    proof states from how many (``num_peers``).
    """

    def __init__(self, plan: Plan, kind: EngineKind) -> None:
        self._kind = kind
        self.proven: dict[tuple[str, str], PairReady] = {}
        self._errors: dict[tuple[str, str], str] = {}
        self.use(plan)

    def use(self, plan: Plan) -> None:
        """Compute which pairs must be proven, from the processes of a plan."""
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
        """Drop a proof; return False if it was already dropped or renewed."""
        proof = self.proven.get((pair.local, pair.peer))
        if proof is None or proof.peer_incarnation != pair.peer_incarnation:
            return False
        del self.proven[pair.local, pair.peer]
        self.fail(pair.local, pair.peer, pair.error)
        return True

    def forget(self, name: str) -> None:
        """Drop all proofs in which a dead process takes part."""
        self.proven = {ends: pair for ends, pair in self.proven.items() if name not in ends}

    def missing(self, among: Iterable[str], of: Collection[str] | None = None) -> list[str]:
        """Return a text for each unproven pair between the engines ``among``, with its last error.

        ``of``: only pairs that include one of these engines.
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
    """Return the engine's name, with which the name of each of its processes begins."""
    return process.partition("/")[0]


def _is_connected(pairs: Sequence[PairReady]) -> bool:
    # Without a proof, the number of ranks that this one pulls from is not known.
    return bool(pairs) and len(pairs) >= max(pair.num_peers for pair in pairs)


def _describe(local: str, engine: str, pairs: Sequence[PairReady], error: str) -> str:
    what = (
        f"a path to only {len(pairs)} of {pairs[0].num_peers} ranks of" if pairs else "no path to"
    )
    return f"{local} has {what} {engine}" + (f": {error}" if error else "")
