"""Shows the state of a launch to views, in immutable snapshots."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from pdlaunch.launch.instance import Instance
from pdlaunch.launch.states import LaunchPhase, ProcessState
from pdlaunch.protocol.control import PairReady


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """Shows one process."""

    name: str
    kind: str
    host: str
    state: ProcessState
    incarnation: int
    pid: int | None = None
    """Process id; None until it has registered."""
    doing: str = ""
    """Words of the process about what it is doing."""
    fraction: float | None = None
    """Share of what it is doing that is done."""
    info: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, instance: Instance) -> ProcessStatus:
        progress = instance.progress if instance.state in _WORKING else None
        return cls(
            name=instance.name,
            kind=instance.spec.kind,
            host=instance.spec.host,
            state=instance.state,
            incarnation=instance.incarnation,
            pid=None if instance.registration is None else instance.registration.pid,
            doing=progress.text if progress is not None else (instance.error or ""),
            fraction=None if progress is None else progress.fraction,
            info=dict(instance.info),
        )


_WORKING = (ProcessState.STARTING, ProcessState.CONVERTING)


@dataclass(frozen=True, slots=True)
class LaunchStatus:
    """Shows the launch."""

    phase: LaunchPhase
    processes: tuple[ProcessStatus, ...]
    pairs: tuple[PairReady, ...] = ()
    num_missing_pairs: int = 0
    url: str = ""
    """URL of the router; empty until it has registered."""


class Observer(Protocol):
    """Shows a user what happens to a launch."""

    def changed(self, status: LaunchStatus) -> None:
        """Take in the status after an event that changed something."""

    def ready(self, status: LaunchStatus) -> None:
        """Take in, once, that the deployment serves."""

    def note(self, text: str) -> None:
        """Show something that a user should read once: a death, a restart, a drain."""
