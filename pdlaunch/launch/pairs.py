"""Keeps which pairs of ranks are proven and which are missing, and finds what joins their GPUs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from pdlaunch.launch.engines.plan import EngineKind
from pdlaunch.machine.facts import GpuLink
from pdlaunch.planning.plan import Plan
from pdlaunch.planning.resolve import ResolvedLaunch
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


def gpu_links(
    resolved: ResolvedLaunch, planned: Plan, pairs: Sequence[PairReady]
) -> list[GpuLink | None]:
    """Return the link of each pair. ``planned``: the processes of the launch.

    None: the pair is not two GPUs of this host, the connector does not use what joins them, or that
    is not known.
    """
    if resolved.config.kv_transfer.connector != "nixl":
        return [None] * len(pairs)
    gpus = _gpus_of_ranks(resolved, planned)
    links = {(link.first, link.second): link for link in resolved.machine.gpu_links}
    ends = [sorted((gpus.get(pair.local, -1), gpus.get(pair.peer, -1))) for pair in pairs]
    return [links.get((first, second)) for first, second in ends]


def _gpus_of_ranks(resolved: ResolvedLaunch, planned: Plan) -> dict[str, int]:
    """Return the index of each rank's GPU on this host."""
    here = resolved.hosts[0].name
    found = {}
    for role, engines in resolved.by_host.get(here, {}).items():
        gpus = {f"cuda:{place}": gpu for place, gpu in enumerate(engines.gpus)}
        for rank in planned.ranks(role):
            gpu = gpus.get(rank.devices[0])
            # An engine's own value of that variable numbers the GPUs in another way.
            is_renumbered = "CUDA_DEVICE_ORDER" in rank.environment
            if rank.host == here and gpu is not None and not is_renumbered:
                found[rank.name] = gpu.index
    return found
