"""The processes of a launch, before any is started."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from pdlaunch.config.models import Role
from pdlaunch.resolve.roles import RoleEngines

_SECRET_WORDS = frozenset({"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD"})


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One process as planned; what runs is an ``instance.Instance`` of it."""

    name: str
    """``router``, ``prefill-0`` (its server), ``prefill-0/rank-0``, ``convert-0``: unique, stable
    over restarts.
    """
    kind: Literal["convert", "router", "server", "rank"]
    unit: str
    """Processes of one unit start, die and are restarted together, under one incarnation."""
    engine: str = ""
    role: Role | None = None
    tp_rank: int = 0
    tp_size: int = 1
    host: str = "localhost"
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    """Variables that are set over the supervisor's."""
    ports: dict[str, int] = {}
    """0: a free one, chosen and registered by the process."""
    devices: tuple[str, ...] = ()
    """``cpu`` or ``cuda:N``."""
    num_threads: int = 1
    cpus: tuple[int, ...] = ()
    """Cores that it may run on. All of them: a rank that is pinned would queue behind servers and
    router while cores idle.
    """


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Every process that a launch starts."""

    conversions: tuple[ProcessSpec, ...] = ()
    """Run first, to their end."""
    processes: tuple[ProcessSpec, ...]

    def shown(self) -> Plan:
        """Return the plan with secret-looking environment variables masked, for printing."""
        return Plan(conversions=_mask(self.conversions), processes=_mask(self.processes))

    def engines(self, role: Role) -> list[str]:
        return list(dict.fromkeys(rank.engine for rank in self.ranks(role)))

    def ranks(self, role: Role) -> list[ProcessSpec]:
        return [p for p in self.processes if p.kind == "rank" and p.role == role]


def plan_processes(
    roles: Sequence[RoleEngines], *, port: int, cpus: tuple[int, ...], conversions: Sequence[str]
) -> Plan:
    """Plan every process; ranks come first, because they take longest to start.

    ``port``, ``cpus``: of the router. ``conversions``: the models that must be converted first.
    """
    engines = [
        process
        for role in roles
        for index in range(role.replicas)
        for process in engine_processes(role, index)
    ]
    return Plan(
        conversions=tuple(
            _conversion(cpus, index, source) for index, source in enumerate(conversions)
        ),
        processes=(
            *(process for process in engines if process.kind == "rank"),
            *(process for process in engines if process.kind != "rank"),
            _router(port, cpus),
        ),
    )


def engine_processes(engines: RoleEngines, index: int) -> tuple[ProcessSpec, ...]:
    """Plan the processes of one engine: its ranks, then its server."""
    name = engines.engine_name(index)
    devices = engines.device_indices(index)
    ranks = [
        ProcessSpec(
            name=f"{name}/rank-{tp_rank}",
            kind="rank",
            unit=f"{name}/ranks",
            engine=name,
            role=engines.role,
            tp_rank=tp_rank,
            tp_size=engines.tp_size,
            host=engines.host,
            command=_python("pdlaunch.engine", "--name", f"{name}/rank-{tp_rank}"),
            environment=dict(engines.environment),
            ports={"side_channel": 0},
            devices=(f"cuda:{devices[tp_rank]}",) if devices else ("cpu",),
            num_threads=engines.num_threads,
            cpus=engines.machine.cpus,
        )
        for tp_rank in range(engines.tp_size)
    ]
    server = ProcessSpec(
        name=name,
        kind="server",
        unit=name,
        engine=name,
        role=engines.role,
        tp_size=engines.tp_size,
        host=engines.host,
        command=_python("pdlaunch.server", "--name", name),
        environment=_light_environment(),
        ports={"http": engines.http_port(index)},
        cpus=engines.machine.cpus,
    )
    return (*ranks, server)


def _router(port: int, cpus: tuple[int, ...]) -> ProcessSpec:
    return ProcessSpec(
        name="router",
        kind="router",
        unit="router",
        command=_python("pdlaunch.router", "--name", "router"),
        environment=_light_environment(),
        ports={"http": port},
        cpus=cpus,
    )


def _conversion(cpus: tuple[int, ...], index: int, source: str) -> ProcessSpec:
    name = f"convert-{index}"
    return ProcessSpec(
        name=name,
        kind="convert",
        unit=name,
        command=_python(
            "pdlaunch.process.guarded",
            "pdlaunch.models.convert",
            source,
            "--if-needed",
            "--traceback",
        ),
        environment={"PYTHONUNBUFFERED": "1"},
        cpus=cpus,
    )


def _python(*arguments: str) -> tuple[str, ...]:
    # -P: files in the current folder must not stand in for modules, as with the `pdlaunch` script
    # itself.
    return (sys.executable, "-P", "-m", *arguments)


def _light_environment() -> dict[str, str]:
    return {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _mask(processes: tuple[ProcessSpec, ...]) -> tuple[ProcessSpec, ...]:
    return tuple(
        msgspec.structs.replace(p, environment=mask_environment(p.environment)) for p in processes
    )


def mask_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Replace the values of variables whose name speaks of a secret."""
    return {
        name: value if _SECRET_WORDS.isdisjoint(name.upper().split("_")) else "***"
        for name, value in environment.items()
    }
