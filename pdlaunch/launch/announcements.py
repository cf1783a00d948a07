"""Tells processes what they need to know of the launch, and answers them behind it.

A router is told all of the registry. Others are told of the engines that theirs exchanges KV blocks
with, so that a change in a launch of a thousand engines costs as much as in one of twenty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pdlaunch.launch.hosts.host import Host
from pdlaunch.launch.instance import Instance
from pdlaunch.launch.registry import RegistryVersions
from pdlaunch.planning.plan import Plan
from pdlaunch.protocol.changes import Answered
from pdlaunch.protocol.control import EndReason, Entry, PairReady, Registry, Restarting


class Announcements:
    """Sends each process its view of the registry when that has changed, then what was answered.

    In this order: who is told that something is done finds it so.
    """

    def __init__(self, plan: Plan, host: Host) -> None:
        self._host = host
        self._registry = RegistryVersions()
        self._views = Views(plan)
        self._views_are_new = False
        self._answers: list[tuple[str, Answered | Restarting]] = []

    def use(self, plan: Plan) -> None:
        """Take in that engines have come or gone."""
        self._views, self._views_are_new = Views(plan), True

    def greet(self, name: str) -> None:
        """Tell a new process what the others know."""
        self._host.send(name, self._views.of(name, self._registry.current))

    def answer(self, name: str, answer: Answered | Restarting) -> None:
        """Keep an answer until all that has changed is told."""
        self._answers.append((name, answer))

    def tell(
        self,
        instances: Iterable[Instance],
        pairs: Sequence[PairReady],
        *,
        serving: bool,
        ends: Mapping[str, Mapping[EndReason, int]],
    ) -> None:
        """Tell what has changed, and answer. Parameters as in ``RegistryVersions.update``."""
        # Who is told of other engines than before is told again, whatever has changed of them.
        before = Registry(version=0, entries=[]) if self._views_are_new else self._registry.current
        if self._registry.update(instances, pairs, serving=serving, ends=ends):
            for name, view in self._views.news(before, self._registry.current):
                self._host.send(name, view)
            self._views_are_new = False
        for name, answer in self._answers:
            self._host.send(name, answer)
        self._answers.clear()


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
