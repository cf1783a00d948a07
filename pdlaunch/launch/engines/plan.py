"""Plans the processes of a launch: those of its engines, and the router.

Supervisor, commands and checks use only ``EngineKind``, not a certain kind of engine.
"""

from collections import defaultdict
from collections.abc import Sequence

import msgspec

from pdlaunch.config.roles import EngineName
from pdlaunch.launch.engines.native import NativeEngine, light_environment, python_command
from pdlaunch.launch.engines.vllm import CAPABILITIES as VLLM_CAPABILITIES
from pdlaunch.launch.engines.vllm import VllmEngine
from pdlaunch.planning.plan import Plan, ProcessSpec
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.protocol.control import MAX_PEERS, Capabilities, due_pairs

# All engines of a launch are of one kind.
EngineKind = NativeEngine | VllmEngine


def kind_of(launch: ResolvedLaunch) -> EngineKind:
    """Return the kind of a launch's engines; if roles differ, rules of both kinds have PD610."""
    first = next(iter(launch.roles.values()), None)
    if first is not None and first.settings.engine == "vllm":
        return VllmEngine(launch)
    return NativeEngine()


def capabilities_over_http(kind: EngineName) -> Capabilities:
    """Return the capabilities that a router assumes for engines given only by URL."""
    return VLLM_CAPABILITIES if kind == "vllm" else Capabilities()


def plan_processes(launch: ResolvedLaunch) -> Plan:
    """Plan every process; ranks come first, because they take longest to start."""
    kind = kind_of(launch)
    engines = [process for engine in launch.engines for process in kind.processes(engine)]
    router = ProcessSpec(
        name="router",
        kind="router",
        unit="router",
        command=python_command("pdlaunch.router", "--name", "router"),
        environment=light_environment(),
        ports={"http": launch.config.port},
        host=launch.hosts[0].name,
    )
    servers_last = sorted(with_peers(engines), key=lambda process: process.kind == "server")
    return Plan(processes=(*servers_last, router))


def with_peers(processes: Sequence[ProcessSpec]) -> list[ProcessSpec]:
    """Limit the ``peers`` of each process if there are too many engines to connect all pairs."""
    names = {
        role: {process.engine for process in processes if process.role == role}
        for role in ("prefill", "decode")
    }
    if max(map(len, names.values())) <= MAX_PEERS:
        return [msgspec.structs.replace(process, peers=None) for process in processes]
    peers: dict[str, list[str]] = defaultdict(list)
    for prefill, decode in sorted(due_pairs(names["prefill"], names["decode"])):
        peers[prefill].append(decode)
        peers[decode].append(prefill)
    return [
        msgspec.structs.replace(process, peers=tuple(peers[process.engine]))
        for process in processes
    ]
