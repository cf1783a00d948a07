"""Plans native engines: ranks with torch, and a server for each engine."""

import sys
from collections.abc import Sequence

from pdlaunch import __version__
from pdlaunch.checks.rule import Rule
from pdlaunch.checks.run import all_rules
from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.planning.plan import ProcessSpec
from pdlaunch.planning.roles import PlacedEngine
from pdlaunch.protocol.control import Capabilities

# Rules PD6xx are about other engines; only these also apply to native engines
_OF_ALL_KINDS = ("PD610", "PD614", "PD615")


class NativeEngine:
    name = "native"

    def processes(self, engine: PlacedEngine) -> Sequence[ProcessSpec]:
        """Plan the ranks of one engine, then its server, which registers and reports for it."""
        name, role = engine.name, engine.engines.role
        ranks = [
            ProcessSpec(
                name=f"{name}/rank-{tp_rank}",
                kind="rank",
                unit=f"{name}/ranks",
                engine=name,
                role=role,
                tp_rank=tp_rank,
                tp_size=engine.engines.tp_size,
                host=engine.host.name,
                command=python_command("pdlaunch.engine", "--name", f"{name}/rank-{tp_rank}"),
                environment=dict(engine.engines.environment),
                ports={"side_channel": 0},
                devices=(device,),
                num_threads=engine.engines.num_threads,
            )
            for tp_rank, device in enumerate(engine.devices)
        ]
        server = ProcessSpec(
            name=name,
            kind="server",
            unit=name,
            engine=name,
            role=role,
            tp_size=engine.engines.tp_size,
            host=engine.host.name,
            command=python_command("pdlaunch.engine.server", "--name", name),
            environment=light_environment(),
            ports={"http": engine.engines.http_port(engine.index)},
        )
        return (*ranks, server)

    def proves_pairs(self, process: ProcessSpec) -> bool:
        """Return True for decode ranks, whose handshakes prove the paths to prefill engines."""
        return process.kind == "rank" and process.role == "decode"

    def capabilities(self, process: ProcessSpec, spec: EngineSpec | None) -> Capabilities:
        assert spec is not None
        return Capabilities(version=__version__, max_num_seqs=spec.max_num_seqs)

    def rules(self) -> Sequence[Rule]:
        rules = all_rules().values()
        return tuple(rule for rule in rules if rule.code[:3] != "PD6" or rule.code in _OF_ALL_KINDS)


def python_command(*arguments: str) -> tuple[str, ...]:
    """Return the command that runs a module of this package with this interpreter."""
    # -P: do not import modules from the current folder.
    return (sys.executable, "-P", "-m", *arguments)


def light_environment() -> dict[str, str]:
    """Return environment variables for processes without torch: one thread for each library."""
    return {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
