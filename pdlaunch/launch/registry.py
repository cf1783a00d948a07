"""Makes what processes are told of the launch: who lives where, and which pairs are proven.

A router is told all of it. Others are told of the engines that theirs exchanges KV blocks with, so
that a change in a launch of a thousand engines costs as much as in one of twenty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from pdlaunch.launch.state import Desired, Instance, LaunchedEngine, Observed
from pdlaunch.launch.status import ProcessState
from pdlaunch.planning.plan import Plan
from pdlaunch.protocol.control import (
    Entry,
    ListedState,
    PairReady,
    Register,
    Registry,
    Withheld,
    why_withheld,
)

_LISTED: Mapping[ProcessState, ListedState] = {
    ProcessState.STARTING: "starting",
    ProcessState.READY: "ready",
    ProcessState.DRAINING: "draining",
    ProcessState.GIVEN_UP: "failed",
}
"""A process in any other state is not listed: everybody hears of a death by that."""


def next_registry(current: Registry, wanted: Desired, seen: Observed) -> Registry:
    """Return a new version of the registry; the current one when nothing has changed."""
    entries = []
    for process in seen.processes():
        engine = seen.engines.get(process.spec.engine)
        withheld: Withheld = ""
        if engine is not None and process.spec.kind == "server":
            withheld = wanted.engines[engine.name].withheld
        if (entry := _entry(process, engine, withheld)) is not None:
            entries.append(entry)
    pairs = list(seen.pairs.proven.values())
    if (entries, pairs, seen.was_ready) == (current.entries, current.pairs, current.serving):
        return current
    return Registry(
        version=current.version + 1,
        entries=entries,
        serving=seen.was_ready,
        pairs=pairs,
        ends={name: dict(counts) for name, counts in seen.ends.items()},
    )


def _entry(process: Instance, engine: LaunchedEngine | None, withheld: Withheld) -> Entry | None:
    """Return the line of a process; None while it is not reachable.

    The server of an engine that was given up keeps a line.
    """
    spec, said = process.spec, process.registration
    reason = why_withheld(withheld, spec.engine)
    if process.state is ProcessState.GIVEN_UP and spec.kind == "server" and engine is not None:
        said = Register(name=process.name, incarnation=process.incarnation, pid=0)
        reason = f"{engine.failed_for}; tried again {engine.retry_s:g} s later"
    if said is None or spec.kind == "convert" or process.state not in _LISTED:
        return None
    state = _LISTED[process.state]
    if state == "ready" and process.is_stalled:
        state = "stalled"
    elif state == "ready" and process.sleep_state != "awake":
        state = process.sleep_state
    return Entry(
        name=process.name,
        kind=spec.kind,
        host=spec.host,
        incarnation=process.incarnation,
        engine=spec.engine,
        role=spec.role,
        devices=spec.devices,
        tp_rank=spec.tp_rank,
        tp_size=spec.tp_size,
        engine_id=said.engine_id,
        address=said.address,
        capabilities=said.capabilities,
        state=state,
        reason=reason,
        peers=spec.peers if spec.kind == "server" else None,
        withheld=withheld,
    )


class Views:
    """Makes the views of the registry that the processes of a plan are sent."""

    def __init__(self, plan: Plan) -> None:
        self._circles = {
            process.name: (process.engine, *process.peers)
            for process in plan.processes
            if process.peers is not None
        }
        """The engines that a process is told of; all, where it has none here."""
        self._grouped = Registry(version=-1, entries=[])
        self._entries: dict[str, list[Entry]] = {}
        self._pairs: dict[str, list[PairReady]] = {}

    def of(self, name: str, registry: Registry) -> Registry:
        """Return what a process is told."""
        circle = self._circles.get(name)
        if circle is None:
            return registry
        if self._grouped is not registry:
            self._group(registry)
        return Registry(
            version=registry.version,
            entries=[entry for engine in circle for entry in self._entries.get(engine, ())],
            serving=registry.serving,
            # A process asks for the pairs that it has proven itself.
            pairs=self._pairs.get(name, []),
        )

    def _group(self, registry: Registry) -> None:
        entries, pairs = defaultdict(list), defaultdict(list)
        for entry in registry.entries:
            entries[entry.engine].append(entry)
        for pair in registry.pairs:
            pairs[pair.local].append(pair)
        self._grouped, self._entries, self._pairs = registry, entries, pairs

    def changed(self, before: Registry, now: Registry) -> Iterator[tuple[str, Registry]]:
        """Yield the views that differ, each with the listed process that it is for.

        Nobody is told later than others: who is told late would use a peer that is gone.
        """
        old_entries = {entry.name: entry for entry in before.entries}
        engines = {e.engine for e in now.entries if old_entries.pop(e.name, None) != e}
        engines |= {entry.engine for entry in old_entries.values()}
        old_pairs = {(pair.local, pair.peer): pair for pair in before.pairs}
        provers = {p.local for p in now.pairs if old_pairs.pop((p.local, p.peer), None) != p}
        provers |= {local for local, _ in old_pairs}
        for entry in now.entries:
            circle = self._circles.get(entry.name)
            if circle is None or entry.name in provers or not engines.isdisjoint(circle):
                yield entry.name, self.of(entry.name, now)
