"""A launch whose engines change: real plans, no processes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import ROLES
from pdlaunch.launch.engines import NativeEngine, plan_processes
from pdlaunch.launch.places import EnginePlaces
from pdlaunch.launch.state import Timing
from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.planning.resolve import resolve
from pdlaunch.planning.roles import PlacedEngine
from pdlaunch.protocol.control import Answered, ChangeEngines, PlannedChange
from tests.checks.contexts import CPU
from tests.config.model_files.files import tiny_model
from tests.launch.fakes import World

CORES = replace(CPU, num_cpus=8)
GPUS = replace(CPU, num_cpus=8, gpus=tuple(Gpu(index, memory_bytes=80 << 30) for index in range(3)))


class Changing(World):
    def __init__(self, folder: Path, machine: Machine = CORES, **settings: Any) -> None:
        config = LaunchConfig.model_validate({"model": tiny_model(folder), **settings})
        resolved = resolve(config, {"local": machine}, {})
        super().__init__(
            plan_processes(resolved),
            Timing(startup_timeout_s=60, drain_s=30, stop_s=5),
            EnginePlaces(resolved, NativeEngine(), {"local"}),
        )
        self.start().all_ready()

    def placed(self, name: str) -> PlacedEngine:
        engines = self.supervisor.places.resolved.engines
        return next(engine for engine in engines if engine.name == name)

    def change(self, **wanted: Any) -> Answered:
        replicas = {role: wanted.pop(role) for role in ROLES if role in wanted}
        return self.ask(ChangeEngines(question=7, replicas=replicas, **wanted))

    def plan_of(self, **wanted: Any) -> PlannedChange:
        answer = self.change(**wanted)
        assert not answer.error
        assert answer.change is not None
        return answer.change

    def answered(self) -> Answered:
        return self.host.sent_to("router", Answered)[-1]

    def become_whole(self, *engines: str) -> None:
        for engine in engines:
            self.become_ready(f"{engine}/rank-0", engine)

    def leave(self, *engines: str) -> None:
        for engine in engines:
            self.drained(engine)
            for name in (f"{engine}/rank-0", engine):
                self.exit(name)

    def given_work(self) -> set[str]:
        return {
            entry.name
            for entry in self.entries().values()
            if (entry.kind, entry.state) == ("server", "ready") and not entry.withheld
        }

    @property
    def engines(self) -> set[str]:
        return {p.name.partition("/")[0] for p in self.status.processes} - {"router"}
