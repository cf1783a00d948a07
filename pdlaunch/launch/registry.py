"""Makes what processes are told of the launch: who lives where, and which pairs are proven.

A router is told all of it. Others are told of the engines that theirs exchanges KV blocks with, so
that a change in a launch of a thousand engines costs as much as in one of twenty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from pdlaunch.launch.state import Desired, Instance, Observed
from pdlaunch.launch.status import ProcessState
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.protocol.control import (
    Entry,
    ListedState,
    PairReady,
    Register,
    Registry,
    Withheld,
    why_withheld,
)

# A process in any other state is not listed: everybody hears of a death by that.
_LISTED: Mapping[ProcessState, ListedState] = {
    ProcessState.STARTING: "starting",
    ProcessState.READY: "ready",
    ProcessState.DRAINING: "draining",
}


def next_registry(current: Registry, wanted: Desired, seen: Observed) -> Registry:
    """Return a new version of the registry; the current one when nothing has changed."""
    listed = (_entry(process, wanted, seen) for process in seen.processes())
    entries = [entry for entry in listed if entry is not None]
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


def _entry(process: Instance, wanted: Desired, seen: Observed) -> Entry | None:
    """Return the line of a process; None while it is not reachable.

    The server of an engine that was given up keeps a line.
    """
    spec, registration, state = process.spec, process.registration, _LISTED.get(process.state)
    withheld: Withheld = ""
    reason = ""
    if state == "ready" and process.is_stalled:
        state = "stalled"
    elif state == "ready" and process.sleep_state != "awake":
        state = process.sleep_state
    if spec.kind == "server" and (engine := seen.engines.get(spec.engine)) is not None:
        withheld = wanted.engines[engine.name].withheld
        reason = why_withheld(withheld, spec.engine)
        if engine.is_given_up:
            state = "failed"
            registration = Register(name=process.name, incarnation=process.incarnation, pid=0)
            reason = f"{engine.failed_for}; tried again {engine.retry_s:g} s later"
    if registration is None or state is None or spec.kind == "convert":
        return None
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
        engine_id=registration.engine_id,
        address=registration.address,
        capabilities=registration.capabilities,
        state=state,
        reason=reason,
        peers=spec.peers if spec.kind == "server" else None,
        withheld=withheld,
    )


class Views:
    """Makes the views of the registry that processes are sent."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[list[Entry], list[PairReady]]] = {}
        self._grouped: Registry | None = None
        self._entries: dict[str, list[Entry]] = {}  # by engine
        self._pairs: dict[str, list[PairReady]] = {}  # by the rank that has proven them

    def of(self, spec: ProcessSpec, registry: Registry) -> Registry:
        """Return what a process is told."""
        if spec.peers is None:
            return registry
        if self._grouped is not registry:
            entries, pairs = defaultdict(list), defaultdict(list)
            for entry in registry.entries:
                entries[entry.engine].append(entry)
            for pair in registry.pairs:
                pairs[pair.local].append(pair)
            self._grouped, self._entries, self._pairs = registry, entries, pairs
        circle = (spec.engine, *spec.peers)
        return Registry(
            version=registry.version,
            entries=[entry for engine in circle for entry in self._entries.get(engine, ())],
            serving=registry.serving,
            # A process asks for the pairs that it has proven itself.
            pairs=self._pairs.get(spec.name, []),
        )

    def changed(self, registry: Registry, seen: Observed) -> Iterator[tuple[str, Registry]]:
        """Yield the views that differ from the last ones, each with the process that it is for.

        Nobody is told later than others: who is told late would use a peer that is gone.
        """
        for entry in registry.entries:
            found = seen.find(entry.name)
            if found is None or found[1].registration is None:
                continue
            view = self.of(found[1].spec, registry)
            content = (view.entries, view.pairs)
            if view is registry or self._sent.get(entry.name) != content:
                self._sent[entry.name] = content
                yield entry.name, view
