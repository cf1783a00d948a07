"""Describes the processes of a launch before they start. ``launch/engines.py`` plans them."""

from collections.abc import Mapping
from typing import Literal, Self

import msgspec

from pdlaunch.config.hosts import LOCAL
from pdlaunch.config.roles import Role
from pdlaunch.config.settings import SECRET, is_secret


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Describes one planned process; a running process is a ``state.Instance`` of the spec."""

    # ``router``, ``prefill-0`` (the engine's server) or ``prefill-0/rank-0``; kept over restarts
    name: str
    kind: Literal["router", "server", "rank"]
    unit: str  # processes of a unit start, die and restart together and share an incarnation
    engine: str = ""
    role: Role | None = None
    tp_rank: int = 0
    tp_size: int = 1
    host: str = LOCAL
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # variables that override the supervisor's environment
    ports: dict[str, int] = {}  # 0: the process takes a free port and registers it
    devices: tuple[str, ...] = ()  # ``cpu`` or ``cuda:N``
    num_threads: int = 1
    # Names of engines with which this engine exchanges KV blocks; None: all of the other role
    peers: tuple[str, ...] | None = None

    @property
    def reads(self) -> str:
        """Return the kind of the processes that read the same model files as this process."""
        # All hosts of an engine of vLLM read the files that its server reads.
        return "server" if self.unit == self.engine else self.kind


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    processes: tuple[ProcessSpec, ...]

    def shown(self) -> Self:
        masked = (mask_environment(process.environment) for process in self.processes)
        pairs = zip(self.processes, masked, strict=True)
        shown = [msgspec.structs.replace(process, environment=env) for process, env in pairs]
        return msgspec.structs.replace(self, processes=tuple(shown))

    def engines(self, role: Role) -> list[str]:
        return list(dict.fromkeys(p.engine for p in self.processes if p.role == role))


def mask_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Mask the values of variables named like a secret."""
    return {name: SECRET if is_secret(f"env.{name}") else it for name, it in environment.items()}
