"""The registry that every process is sent: who lives, where, in which incarnation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pdlaunch.protocol.control import Entry, PairReady, Registry
from pdlaunch.supervisor.instance import Instance


class RegistryBook:
    """Versions of the registry. The version grows with every change and never without one."""

    def __init__(self) -> None:
        self._current = Registry(version=0, entries=[], serving=False)

    @property
    def current(self) -> Registry:
        return self._current

    def update(
        self, instances: Iterable[Instance], pairs: Sequence[PairReady] = (), *, serving: bool
    ) -> bool:
        """Take in the state of all instances, pairs and of the launch; True when the registry has
        changed and must be sent.
        """
        entries: list[Entry] = [
            entry for instance in instances if (entry := instance.entry()) is not None
        ]
        current = self._current
        if (entries, list(pairs), serving) == (current.entries, current.pairs, current.serving):
            return False
        self._current = Registry(
            version=current.version + 1, entries=entries, serving=serving, pairs=list(pairs)
        )
        return True
