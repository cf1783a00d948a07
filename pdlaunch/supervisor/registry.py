"""The registry that every process is sent: who lives, where, in which incarnation."""

from __future__ import annotations

from collections.abc import Iterable

from pdlaunch.protocol.control import Entry, Registry
from pdlaunch.supervisor.instance import Instance


class RegistryBook:
    """Versions of the registry. The version grows with every change and never without one."""

    def __init__(self) -> None:
        self._current = Registry(version=0, entries=[], serving=False)

    @property
    def current(self) -> Registry:
        return self._current

    def update(self, instances: Iterable[Instance], *, serving: bool) -> bool:
        """Take in the state of all instances and of the launch; True when the registry has changed and must be sent."""
        entries: list[Entry] = [entry for instance in instances if (entry := instance.entry()) is not None]
        if entries == self._current.entries and serving == self._current.serving:
            return False
        self._current = Registry(version=self._current.version + 1, entries=entries, serving=serving)
        return True
