"""Tells processes what they need to know of the launch, and answers them behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pdlaunch.hosts.host import Host
from pdlaunch.protocol.changes import Answered
from pdlaunch.protocol.control import EndReason, PairReady, Registry, Restarting
from pdlaunch.resolve.plan import Plan
from pdlaunch.supervisor.instance import Instance
from pdlaunch.supervisor.registry import RegistryVersions
from pdlaunch.supervisor.views import Views


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
