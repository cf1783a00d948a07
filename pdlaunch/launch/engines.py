"""Plans the processes of a launch: native engines with a server and ranks, engines of vLLM with
sidecars, which start ``vllm serve`` and report for it, and the router.

Supervisor, commands and checks use only ``EngineKind``, not a certain kind of engine.
"""

import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import msgspec
from pydantic import JsonValue

from pdlaunch import __version__
from pdlaunch.checks import running_rules
from pdlaunch.checks.rule import Rule
from pdlaunch.checks.run import all_rules
from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.roles import PAIR, EngineName
from pdlaunch.config.vllm_arguments import OFFLOADING, host_tier_of, long_name, vllm_flag_name
from pdlaunch.planning.plan import Plan, ProcessSpec
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import RoleEngines
from pdlaunch.planning.roles import PlacedEngine
from pdlaunch.protocol.control import MAX_PEERS, Capabilities, due_pairs

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
        # It handshakes with the prefill ranks that it pulls from.
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


# Rules about running engines, which only `pdlaunch doctor` checks
OF_RUNNING_ENGINES = frozenset(rule.code for rule in running_rules.RULES)
# Capabilities of every vLLM with its default lease; ``with_version`` adds those of its version.
CAPABILITIES = Capabilities(kind="vllm", lease_s=30.0, takes_launch_token=False)


class VllmEngine:
    name = "vllm"

    def __init__(self, launch: ResolvedLaunch) -> None:
        self._config = launch.config
        self._served_model_name = launch.served_model_name
        self._has_doors = launch.spans_hosts  # sidecars accept the requests for their engines

    def processes(self, engine: PlacedEngine) -> Sequence[ProcessSpec]:
        """Plan the sidecars of one engine, one per host; vLLM's processes are their children."""
        engines, name = engine.engines, engine.name
        sidecar = python_command(
            "pdlaunch.launch.sidecar",
            "--name",
            name,
            "--hang-timeout",
            f"{self._config.hang_timeout_s:g}",
            *(("--exact",) if engines.dtype == "float32" else ()),
            *(("--unverified", engines.unverified) if engines.unverified else ()),
        )
        return tuple(
            ProcessSpec(
                name=f"{name}/node-{node_rank}" if node_rank else name,
                kind="rank" if node_rank else "server",
                unit=name,
                engine=name,
                role=engines.role,
                tp_rank=node_rank * engines.settings.ranks_per_node,
                tp_size=engines.settings.ranks_of_copy,
                host=node.engines.host,
                command=(*sidecar, "--", *self.command(engines, engine.index, node_rank)),
                environment=light_environment() | dict(node.engines.environment) | _visible(node),
                ports={} if node_rank else {"http": engines.http_port(engine.index)},
                devices=tuple(f"cuda:{device}" for device in node.device_indices) or ("cpu",),
                num_threads=node.engines.num_threads,
            )
            for node_rank, node in enumerate(engine.nodes)
        )

    def command(self, engines: RoleEngines, index: int, node_rank: int = 0) -> tuple[str, ...]:
        """Return the ``vllm serve`` command of one engine, without the arguments of its sidecar.

        The sidecar adds a Unix socket to listen at, unless the command has a fixed port (doors of
        sidecars listen at it instead), and ``--master-port`` for an engine over several hosts.
        ``engines``: settings on the first host; ``node_rank``: index of the host.
        """
        settings = engines.settings
        flags = dict(self._flags(engines))
        if (port := engines.http_port(index)) and not self._has_doors:
            flags |= {"host": engines.on.bind_address, "port": port}
        if (nnodes := settings.nnodes) > 1:
            flags |= {
                "nnodes": nnodes,
                "node-rank": node_rank,
                "master-addr": engines.on.bind_address,
                "distributed-executor-backend": "mp",
                "headless": bool(node_rank) or None,
            }
        executable = shutil.which(settings.engine_command) or settings.engine_command
        model = engines.model.path or settings.model
        args = {
            key: value
            for key, value in settings.engine_args.items()
            # With these, vLLM would replace the connector; ``_our_connector`` adds the host tier.
            if engines.role not in PAIR or long_name(key) not in OFFLOADING
        }
        return (executable, "serve", model, *_as_arguments(flags | args))

    def proves_pairs(self, process: ProcessSpec) -> bool:
        # The sidecar of a decode engine sends canaries to prefill engines.
        return process.kind == "server" and process.role == "decode"

    def capabilities(self, process: ProcessSpec, spec: EngineSpec | None) -> Capabilities:
        assert process.role is not None
        settings = self._config.engine_settings(process.role)
        given = self._config.model_fields_set | self._config.role(process.role).model_fields_set
        # Each data parallel rank has a batch.
        max_num_seqs = settings.max_num_seqs * settings.data_parallel_size
        transfer = self._config.kv_transfer
        return msgspec.structs.replace(
            CAPABILITIES,
            # vLLM's own connector counts leases in whole seconds.
            lease_s=float(int(transfer.lease_s)) if transfer.is_stock else transfer.lease_s,
            splits_reasoning=any(
                name.replace("_", "-") == "reasoning-parser" for name in settings.engine_args
            ),
            max_num_seqs=max_num_seqs if "max_num_seqs" in given else 0,
        )

    def rules(self) -> Sequence[Rule]:
        rules = all_rules().values()
        return tuple(
            rule for rule in rules if not rule.native_alone and rule.code not in OF_RUNNING_ENGINES
        )

    def _flags(self, engines: RoleEngines) -> Iterator[tuple[str, JsonValue]]:
        """Yield vLLM's flags from the settings; unset options keep vLLM's default."""
        settings, transfer = engines.settings, self._config.kv_transfer
        on_gpu = engines.device == "cuda"
        yield "served-model-name", self._served_model_name
        yield "tensor-parallel-size", engines.tp_size
        for name in ("pipeline", "data"):
            if (size := getattr(settings, f"{name}_parallel_size")) > 1:
                yield f"{name}-parallel-size", size
        if settings.load_format != "auto":
            yield "load-format", settings.load_format
        # ``_as_arguments`` omits flags with value None, so vLLM uses its default.
        yield from {
            "dtype": engines.dtype,
            "max-model-len": settings.max_model_len,
            "max-num-batched-tokens": settings.max_num_batched_tokens,
            **{
                name.replace("_", "-"): getattr(settings, name) if name in engines.given else None
                for name in ("block_size", "max_num_seqs", "gpu_memory_utilization")
            },
            "no-enable-prefix-caching": not settings.enable_prefix_caching or None,
            "enforce-eager": settings.enforce_eager or None,
            "enable-sleep-mode": settings.enable_sleep_mode or None,
            "enable-cumem-allocator": settings.enable_cumem_allocator if on_gpu else None,
            "no-async-scheduling": not settings.async_scheduling or None,
            "kv-cache-memory-bytes": settings.kv_cache_memory if on_gpu else None,
        }.items()
        yield "shutdown-timeout", int(self._config.drain_timeout_s)
        yield "enable-prompt-tokens-details", True
        if engines.role not in PAIR:
            return
        stock: dict[str, JsonValue] = {
            "kv_connector": "NixlConnector",
            "kv_buffer_device": engines.device,
            "kv_connector_extra_config": {"kv_lease_duration": int(transfer.lease_s)},
            "kv_role": "kv_both",
        }
        ours = _our_connector(host_tier_of(settings.engine_args)[1])
        connector = stock if transfer.is_stock else ours
        yield "kv-transfer-config", connector | {"kv_load_failure_policy": transfer.on_failure}


def _visible(node: PlacedEngine) -> dict[str, str]:
    devices = ",".join(str(device) for device in node.device_indices)
    return {"CUDA_VISIBLE_DEVICES": devices} if devices else {}


def _our_connector(host_tier_gib: JsonValue) -> dict[str, JsonValue]:
    """Return vLLM's settings for pdlaunch's connector, alone or combined with vLLM's host tier.

    ::

        MultiConnector ─┬─ PdlaunchConnector      asked first: blocks of a prefill engine, proven
                        └─ OffloadingConnector    blocks that this engine has copied to the host

    Blocks are kept until leases of the first connector end. The second copies blocks that were
    proven or computed here, and keeps no blocks of the device.
    """
    ours: dict[str, JsonValue] = {
        "kv_connector": "PdlaunchConnector",
        "kv_connector_module_path": "pdlaunch.vllm.connector",
        "kv_connector_extra_config": {},
        "kv_role": "kv_both",
    }
    if not host_tier_gib:
        return ours
    tier: JsonValue = {
        "kv_connector": "OffloadingConnector",
        "kv_connector_extra_config": {"cpu_bytes_to_use": int(float(str(host_tier_gib)) * 2**30)},
        "kv_role": "kv_both",
    }
    return {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {"connectors": [ours, tier]},
        "kv_role": "kv_both",
    }


def _as_arguments(flags: Mapping[str, JsonValue]) -> Iterator[str]:
    for name, value in flags.items():
        flag = f"--{vllm_flag_name(name)}"
        match value:
            case True:
                yield flag
            case False:
                yield f"--no-{flag.removeprefix('--')}"
            case None:
                continue
            case list():
                yield flag
                yield from map(_as_value, value)
            case _:
                yield from (flag, _as_value(value))


def _as_value(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


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
    return CAPABILITIES if kind == "vllm" else Capabilities()


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
