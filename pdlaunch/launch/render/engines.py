"""Derives what the machines of one role need: devices, memory, cores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pdlaunch.config.roles import Role
from pdlaunch.launch.render.settings import Machines
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import RoleEngines

PROCESS_BYTES = 1 << 30
"""Host memory that a rank takes beside weights and KV cache: libraries, tokenizer, buffers."""
GRACE_S = 20
"""Time beside the drain: the router ends what is left, processes stop, stragglers are killed."""


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """Describes the machines of one role."""

    machines: Machines
    num_ranks: int
    """Ranks on one machine."""
    num_gpus: int
    num_cpus: int
    memory_bytes: int | None
    """Host memory that one machine needs; None: the model's shape is not known."""

    @property
    def role(self) -> Role:
        return self.machines.role

    @property
    def num_engines(self) -> int:
        return len(self.machines.names)


def engine_groups(launch: ResolvedLaunch, machines: Sequence[Machines]) -> tuple[EngineGroup, ...]:
    """Return what the machines of each role need."""
    return tuple(_group(launch.roles[group.role], group) for group in machines)


def grace_s(launch: ResolvedLaunch) -> int:
    """Return the seconds that a machine gets between SIGTERM and SIGKILL: longer than a drain."""
    return math.ceil(launch.config.drain_timeout_s) + GRACE_S


def _group(engines: RoleEngines, machines: Machines) -> EngineGroup:
    num_ranks = engines.tp_size
    on_gpu = engines.device == "cuda"
    footprint = engines.footprint
    held = 0 if on_gpu or footprint is None else footprint.total_bytes
    rank_bytes = PROCESS_BYTES + engines.host_tier_bytes + held
    return EngineGroup(
        machines=machines,
        num_ranks=num_ranks,
        num_gpus=num_ranks if on_gpu else 0,
        # A core for each rank of a GPU, and one for the engine's server.
        num_cpus=1 + num_ranks * (1 if on_gpu else engines.num_threads),
        memory_bytes=None if footprint is None else PROCESS_BYTES + num_ranks * rank_bytes,
    )
