"""Chooses what each process is told of the registry.

A router is told all of it. Others are told of the engines that theirs exchanges KV blocks with, so
that a change in a launch of a thousand engines costs as much as in one of twenty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from pdlaunch.protocol.control import Entry, PairReady, Registry
from pdlaunch.resolve.plan import Plan


class Views:
    """Makes the views of a launch's processes."""

    def __init__(self, plan: Plan) -> None:
        self._circles = {
            process.name: (process.engine, *process.peers)
            for process in plan.processes
            if process.peers is not None
        }
        """The engines that a process is told of; all, where it has none here."""
        self._grouped = _Grouped(Registry(version=0, entries=[]))

    def of(self, name: str, registry: Registry) -> Registry:
        """Return what a process is told."""
        circle = self._circles.get(name)
        if circle is None:
            return registry
        if self._grouped.registry is not registry:
            self._grouped = _Grouped(registry)
        return Registry(
            version=registry.version,
            entries=[entry for engine in circle for entry in self._grouped.entries[engine]],
            serving=registry.serving,
            # A process asks for the pairs that it has proven itself.
            pairs=self._grouped.pairs[name],
        )

    def news(self, before: Registry, now: Registry) -> Iterator[tuple[str, Registry]]:
        """Yield the views that differ between two registries, each with the listed process that it
        is for.

        Nobody is told later than others: who is told late would use a peer that is gone.
        """
        engines, provers = _changed_engines(before, now), _changed_provers(before, now)
        for entry in now.entries:
            circle = self._circles.get(entry.name)
            if circle is None or entry.name in provers or not engines.isdisjoint(circle):
                yield entry.name, self.of(entry.name, now)


def _changed_engines(before: Registry, now: Registry) -> set[str]:
    """Return the engines whose processes have come, gone or changed."""
    old = {entry.name: entry for entry in before.entries}
    changed = {entry.engine for entry in now.entries if old.pop(entry.name, None) != entry}
    return changed | {entry.engine for entry in old.values()}


def _changed_provers(before: Registry, now: Registry) -> set[str]:
    """Return the processes whose proofs have come, gone or changed."""
    old = {(pair.local, pair.peer): pair for pair in before.pairs}
    changed = {pair.local for pair in now.pairs if old.pop((pair.local, pair.peer), None) != pair}
    return changed | {local for local, _ in old}


class _Grouped:
    """Holds the entries of a registry by engine, and its pairs by the process that has proven
    them.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.entries: dict[str, list[Entry]] = defaultdict(list)
        self.pairs: dict[str, list[PairReady]] = defaultdict(list)
        for entry in registry.entries:
            self.entries[entry.engine].append(entry)
        for pair in registry.pairs:
            self.pairs[pair.local].append(pair)
