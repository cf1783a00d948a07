"""Describes the processes of a launch, before any is started. ``engines.plan`` plans them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from pdlaunch.config.hosts import LOCAL
from pdlaunch.config.roles import Role
from pdlaunch.config.settings import SECRET, is_secret


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Describes one process as planned; what runs is an ``state.Instance`` of it."""

    # Is ``router``, ``prefill-0`` (its server) or ``prefill-0/rank-0``; stable over restarts
    name: str
    kind: Literal["router", "server", "rank"]
    unit: str  # processes of one unit start, die and are restarted together, under one incarnation
    engine: str = ""
    role: Role | None = None
    tp_rank: int = 0
    tp_size: int = 1
    host: str = LOCAL
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # variables that are set over the supervisor's
    ports: dict[str, int] = {}  # 0: a free one, chosen and registered by the process
    devices: tuple[str, ...] = ()  # ``cpu`` or ``cuda:N``
    num_threads: int = 1
    # The engines that its engine exchanges KV blocks with; None: all
    peers: tuple[str, ...] | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Lists every process that a launch starts."""

    processes: tuple[ProcessSpec, ...]

    def shown(self) -> Plan:
        """Return the plan with secret-looking environment variables masked, for printing."""
        return Plan(
            processes=tuple(
                msgspec.structs.replace(p, environment=mask_environment(p.environment))
                for p in self.processes
            )
        )

    def engines(self, role: Role) -> list[str]:
        return list(dict.fromkeys(p.engine for p in self.processes if p.role == role))


def mask_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Replace the values of variables whose name speaks of a secret."""
    return {name: SECRET if is_secret(f"env.{name}") else it for name, it in environment.items()}
