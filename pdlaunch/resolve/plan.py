"""``plan(config, machine) -> Plan``: every process of a launch, before anything is started or read
from the model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from pdlaunch.config.models import LaunchConfig, Role
from pdlaunch.errors import ConfigError
from pdlaunch.platform.facts import Machine

ROLES: tuple[Role, ...] = ("prefill", "decode")
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
    """Set for the process, over what the supervisor has."""
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
    """Everything that a launch starts."""

    conversions: tuple[ProcessSpec, ...] = ()
    """Run first, to their end."""
    processes: tuple[ProcessSpec, ...]

    def shown(self) -> Plan:
        """The plan with the values of secret-looking environment variables masked, for printing."""
        return Plan(conversions=_mask(self.conversions), processes=_mask(self.processes))

    def engines(self, role: Role) -> list[str]:
        return list(dict.fromkeys(rank.engine for rank in self.ranks(role)))

    def ranks(self, role: Role) -> list[ProcessSpec]:
        return [p for p in self.processes if p.kind == "rank" and p.role == role]


def plan(
    config: LaunchConfig,
    machine: Machine,
    environ: Mapping[str, str],
    conversions: Sequence[str] = (),
) -> Plan:
    """Every process of ``config`` on ``machine``; ranks come first, because they take longest to
    start.

    ``environ``: the supervisor's own; ``conversions``: the models that must be converted first.
    Raises ConfigError when there is no engine, or not the device for one.
    """
    placement = Placement(config, machine)
    ranks = [
        _rank(placement, environ, role, index, tp_rank)
        for role, index, tp_rank in _each_rank(config)
    ]
    servers = [
        _server(config, machine, role, index)
        for role in ROLES
        for index in range(config.role(role).replicas)
    ]
    if not ranks:
        raise ConfigError(
            "there is no engine to start",
            field="prefill.replicas",
            value=0,
            fix="set prefill.replicas and decode.replicas to 1 or more",
        )
    return Plan(
        conversions=tuple(
            _conversion(machine, index, source) for index, source in enumerate(conversions)
        ),
        processes=(*ranks, *servers, _router(config, machine)),
    )


class Placement:
    """Which device and how many threads each rank gets: GPUs round-robin over all ranks, cores
    shared evenly.
    """

    def __init__(self, config: LaunchConfig, machine: Machine) -> None:
        self.config = config
        self.machine = machine
        self._ranks = list(_each_rank(config))

    def device(self, role: Role) -> Literal["cpu", "cuda"]:
        """Raises ConfigError when the machine has too few GPUs for one engine."""
        settings = self.config.engine_settings(role)
        wanted = settings.device
        if wanted == "cpu" or (wanted == "auto" and not len(self.machine.gpus)):
            return "cpu"
        if not len(self.machine.gpus):
            raise ConfigError(
                "no CUDA device was found",
                field="device",
                value=wanted,
                fix="set device: cpu, or check nvidia-smi",
            )
        tp_size = self.config.role(role).tensor_parallel_size
        if tp_size > len(self.machine.gpus):
            raise ConfigError(
                (
                    f"an engine of {tp_size} ranks needs {tp_size} GPUs, this machine has "
                    f"{len(self.machine.gpus)}"
                ),
                field=f"{role}.tensor_parallel_size",
                value=tp_size,
                fix=f"set it to {len(self.machine.gpus)} or less",
            )
        return "cuda"

    def device_indices(self, role: Role, index: int) -> tuple[int, ...]:
        """CUDA device of each rank of an engine; empty on a CPU."""
        if self.device(role) == "cpu":
            return ()
        on_gpus = [rank for rank in self._ranks if self.device(rank[0]) == "cuda"]
        first = on_gpus.index((role, index, 0))
        tp_size = self.config.role(role).tensor_parallel_size
        return tuple((first + tp_rank) % len(self.machine.gpus) for tp_rank in range(tp_size))

    def num_threads(self, role: Role) -> int:
        wanted = self.config.engine_settings(role).num_threads
        return wanted or max(1, len(self.machine.cpus) // len(self._ranks))


def _each_rank(config: LaunchConfig) -> Iterator[tuple[Role, int, int]]:
    for role in ROLES:
        section = config.role(role)
        for index in range(section.replicas):
            for tp_rank in range(section.tensor_parallel_size):
                yield role, index, tp_rank


def _rank(
    placement: Placement, environ: Mapping[str, str], role: Role, index: int, tp_rank: int
) -> ProcessSpec:
    engine = f"{role}-{index}"
    name = f"{engine}/rank-{tp_rank}"
    devices = placement.device_indices(role, index)
    num_threads = placement.num_threads(role)
    return ProcessSpec(
        name=name,
        kind="rank",
        unit=f"{engine}/ranks",
        engine=engine,
        role=role,
        tp_rank=tp_rank,
        tp_size=placement.config.role(role).tensor_parallel_size,
        command=_python("pdlaunch.engine", "--name", name),
        environment=_rank_environment(placement, role, environ),
        ports={"side_channel": 0},
        devices=(f"cuda:{devices[tp_rank]}",) if devices else ("cpu",),
        num_threads=num_threads,
        cpus=placement.machine.cpus,
    )


def _server(config: LaunchConfig, machine: Machine, role: Role, index: int) -> ProcessSpec:
    engine = f"{role}-{index}"
    return ProcessSpec(
        name=engine,
        kind="server",
        unit=engine,
        engine=engine,
        role=role,
        tp_size=config.role(role).tensor_parallel_size,
        command=_python("pdlaunch.server", "--name", engine),
        environment=_light_environment(),
        ports={"http": config.role(role).port and config.role(role).port + index},
        cpus=machine.cpus,
    )


def _router(config: LaunchConfig, machine: Machine) -> ProcessSpec:
    return ProcessSpec(
        name="router",
        kind="router",
        unit="router",
        command=_python("pdlaunch.router", "--name", "router"),
        environment=_light_environment(),
        ports={"http": config.port},
        cpus=machine.cpus,
    )


def _conversion(machine: Machine, index: int, source: str) -> ProcessSpec:
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
        cpus=machine.cpus,
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


def _rank_environment(
    placement: Placement, role: Role, environ: Mapping[str, str]
) -> dict[str, str]:
    """Threads as planned, then what the user has set, the engine's ``env`` first; what the
    connector needs is last.
    """
    env = placement.config.engine_settings(role).env
    num_threads = placement.num_threads(role)
    return {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        # Models are folders by now; a rank that asks a hub would only wait for a time-out.
        "HF_HUB_OFFLINE": environ.get("HF_HUB_OFFLINE", "1"),
        **env,
        **placement.config.kv_transfer.environment({**environ, **env}, placement.device(role)),
    }


def _mask(processes: tuple[ProcessSpec, ...]) -> tuple[ProcessSpec, ...]:
    return tuple(
        msgspec.structs.replace(p, environment=_mask_environment(p.environment)) for p in processes
    )


def _mask_environment(environment: dict[str, str]) -> dict[str, str]:
    return {
        name: value if _SECRET_WORDS.isdisjoint(name.upper().split("_")) else "***"
        for name, value in environment.items()
    }
