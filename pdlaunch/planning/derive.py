"""Derives what the settings of a role come to on a host: devices, sizes, memory, environment."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePath

from pdlaunch.config.connectors import KVNetwork, local_transports
from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.engine_spec import ENGINE_HOST
from pdlaunch.config.field_types import set_paths
from pdlaunch.config.model_files.shape import HYBRID, ModelShape
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import PAIR, Role
from pdlaunch.config.sizes import parse_size
from pdlaunch.config.vllm_arguments import long_name
from pdlaunch.machine.allocator_conf import expandable_segments_variable
from pdlaunch.machine.engine_commands import EngineCommand, find_engine_command
from pdlaunch.machine.facts import Machine
from pdlaunch.machine.visible_gpus import VISIBLE_DEVICES, VisibleGpus, visible_gpus
from pdlaunch.planning.footprint import make_footprint
from pdlaunch.planning.hosts import DeviceKind, ResolvedHost
from pdlaunch.planning.models import Model
from pdlaunch.planning.role_engines import Allocator, DTypeName, RoleEngines
from pdlaunch.vllm.support import SUPPORTED_VERSIONS, is_supported

CPU_KV_CACHE_BYTES = parse_size("1GiB")
CPU_BATCHED_TOKENS = 512
CUDA_BATCHED_TOKENS = 8192


def visible_on(host: ResolvedHost, settings: EngineSettings) -> VisibleGpus:
    """Return the GPUs that ranks with these settings see on a host."""
    own = {**host.environ, **settings.env}.get(VISIBLE_DEVICES)
    return visible_gpus(host.machine.gpus, host.environ.get(VISIBLE_DEVICES), own)


def derive_engines(
    config: LaunchConfig,
    role: Role,
    host: ResolvedHost,
    model: Model,
    unverified: str,
    num_ranks: int,
    *,
    has_far_peers: bool,
) -> RoleEngines:
    """Resolve a role on a host. ``num_ranks``: those of all roles there, which share its cores."""
    section, settings, machine = config.role(role), config.engine_settings(role), host.machine
    given_environ = {**host.environ, **settings.env}
    visible = visible_on(host, settings)
    device = device_kind(settings, machine, visible)
    on_cpu = device == "cpu"
    dtype = _dtype(settings, model.shape, device, machine)
    max_model_len = _max_model_len(settings, model.shape)
    batched_tokens = settings.max_num_batched_tokens or (
        CPU_BATCHED_TOKENS if on_cpu else CUDA_BATCHED_TOKENS
    )
    kv_cache_bytes = settings.kv_cache_memory or (CPU_KV_CACHE_BYTES if on_cpu else None)
    if settings.engine == "vllm" and on_cpu and kv_cache_bytes is not None:
        kv_cache_bytes = whole_gibibytes(kv_cache_bytes)
    num_threads = settings.num_threads or max(1, machine.num_cpus // num_ranks)
    cumem = _cumem_allocator(settings)
    return RoleEngines(
        role=role,
        replicas=section.replicas,
        tp_size=settings.tensor_parallel_size,
        num_ranks=section.replicas * settings.tensor_parallel_size,
        settings=settings,
        overrides=frozenset(set_paths(section)),
        given=frozenset(set_paths(section)) | config.model_fields_set,
        ports=section.ports(),
        host=host.name,
        machine=machine,
        bind_address=host.bind_address,
        advertise_address=host.advertise_address,
        model=model,
        device=device,
        gpus=visible.gpus,
        gpus_problem=visible.problem,
        first_gpu_rank=0,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_batched_tokens=batched_tokens,
        kv_cache_bytes=kv_cache_bytes,
        num_threads=num_threads,
        # A CPU computes the step itself: nobody is free to prepare the next one meanwhile.
        async_scheduling=settings.async_scheduling and not on_cpu,
        cumem_allocator=cumem,
        allocator=_allocator(device, cumem, given_environ),
        footprint=None
        if model.shape is None or dtype is None or max_model_len is None
        else make_footprint(
            model.shape,
            settings,
            tp_size=settings.tensor_parallel_size,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_batched_tokens=batched_tokens,
            kv_cache_bytes=kv_cache_bytes,
        ),
        unverified=unverified,
        given_environ=given_environ,
        environment=_environment(
            config,
            role,
            settings,
            device,
            machine,
            given_environ,
            num_threads,
            kv_cache_bytes,
            is_verified=not unverified,
            network=KVNetwork(
                host.bind_address, config.kv_transfer.data_ports, machine.rdma_devices
            )
            if has_far_peers and config.kv_transfer.trusted_network
            else None,
        ),
        has_far_peers=has_far_peers,
    )


def _environment(
    config: LaunchConfig,
    role: Role,
    settings: EngineSettings,
    device: DeviceKind,
    machine: Machine,
    given_environ: Mapping[str, str],
    num_threads: int,
    kv_cache_bytes: int | None,
    *,
    is_verified: bool,
    network: KVNetwork | None,
) -> dict[str, str]:
    """Return the variables that the processes of an engine get over the supervisor's.

    ``network``: of a role with peers on other hosts; None where KV blocks may not use it.
    """
    common = {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        # Models are folders by now; a rank that asks a hub would only wait for a time-out.
        "HF_HUB_OFFLINE": given_environ.get("HF_HUB_OFFLINE", "1"),
    }
    if settings.engine == "vllm":
        own = vllm_environment(
            kv_cache_bytes if device == "cpu" else None,
            settings,
            ENGINE_HOST if network is None else network.address,
        )
        if network is not None:
            carrier = config.kv_transfer.carrier_settings
            to_hosts = carrier.environment(given_environ, device, network)
            return common | own | settings.env | to_hosts
        is_quiet = is_verified and role in PAIR
        quiet = ",".join(local_transports(given_environ, device)) if is_quiet else ""
        # pdlaunch's connector makes NIXL's agent such that UCX can do without a listener.
        return common | own | settings.env | ({"UCX_TLS": quiet} if quiet else {})
    if role not in PAIR:
        return common | settings.env
    # NIXL refuses a UCX_TLS without CUDA on a host with GPUs, even to a rank on the CPU that sees
    # none.
    of_host: DeviceKind = "cuda" if machine.gpus or machine.has_hidden_gpus else device
    # Last: what the connector needs narrows what the user has set.
    carrier = config.kv_transfer.carrier_settings
    return common | settings.env | carrier.environment(given_environ, of_host, network)


def device_kind(settings: EngineSettings, machine: Machine, visible: VisibleGpus) -> DeviceKind:
    """Return the device that ranks with these settings run on."""
    if settings.device != "auto":
        return settings.device
    # A variable that is wrong must not turn the role into one on the CPU.
    return "cuda" if visible.gpus or (visible.problem and machine.gpus) else "cpu"


def _dtype(
    settings: EngineSettings, shape: ModelShape | None, device: DeviceKind, machine: Machine
) -> DTypeName | None:
    """Return the dtype; ``auto`` is the checkpoint's.

    But float32 where the CPU would emulate a 16-bit type (measured: 6 times slower prefill).
    """
    if settings.dtype != "auto":
        return settings.dtype
    if device == "cpu" and not machine.has_native_bf16:
        return "float32"
    if shape is None:
        return None
    match shape.dtype:
        case "bfloat16" | "float16":
            return shape.dtype
        case _:
            return "float32"


def _max_model_len(settings: EngineSettings, shape: ModelShape | None) -> int | None:
    """Return the longest request; a length that the model was not made for is cut to its limit."""
    if shape is None:
        return settings.max_model_len
    limit = shape.max_position_embeddings
    return min(settings.max_model_len or limit, limit)


def _cumem_allocator(settings: EngineSettings) -> bool | None:
    """Return whether memory comes from CuMem pools, which sleep mode turns on.

    None: sleep mode is on, and the pools are switched off by name.
    """
    if settings.enable_sleep_mode:
        return None if settings.enable_cumem_allocator is False else True
    return settings.enable_cumem_allocator is True


def _allocator(device: DeviceKind, cumem: bool | None, environ: Mapping[str, str]) -> Allocator:
    if device == "cpu":
        return "host"
    if cumem:
        return "cumem"
    return "expandable_segments" if expandable_segments_variable(environ) else "cuda"


GIBIBYTE = 1024**3


def whole_gibibytes(num_bytes: int) -> int:
    """Return the size of the KV cache that vLLM makes of ``num_bytes`` on a CPU."""
    return max(1, num_bytes // GIBIBYTE) * GIBIBYTE


def vllm_environment(
    kv_cache_bytes: int | None, settings: EngineSettings, side_channel_host: str = ENGINE_HOST
) -> dict[str, str]:
    """Return the variables for ``vllm serve``; those of the user go over them.

    ``kv_cache_bytes``: of one rank on a CPU; None on a GPU. ``side_channel_host``: the address of
    an engine with peers on other hosts.
    """
    common = {
        # It would report model, hardware and settings to its makers.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # The address that its side channel binds, and tells decode engines.
        "VLLM_NIXL_SIDE_CHANNEL_HOST": side_channel_host,
        # Without it, loopback of its own groups is looked up by the host's name.
        "VLLM_HOST_IP": ENGINE_HOST,
        # The InfiniBand module crashes the process in a finaliser at exit (NIXL 1.5.1).
        "UCX_MODULES": "^ib",
        # Routes by which anybody who can connect runs methods in the engine; /sleep is among them.
        "VLLM_SERVER_DEV_MODE": "1" if settings.enable_sleep_mode else "0",
    }
    if kv_cache_bytes is None:
        return common
    return common | {
        # Else it pins its threads to cores by itself, all engines to the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_bytes // GIBIBYTE),
    }


AWAITS_AGENT = "its agent has not joined yet"
"""Ends a reason that the start of the launch may remove."""
_SPLITTING = (
    "decode-context-parallel-size",
    "speculative-config",
)
"""Arguments of vLLM with which an engine keeps KV in a way that the connector refuses."""


def engine_command_on(
    host: ResolvedHost, here: ResolvedHost, command: str, environ: Mapping[str, str]
) -> EngineCommand | None:
    """Return what is known of an executable on the host of an engine; None: its agent has not told.

    ``here``: the supervisor's host, where ``environ`` says how to find it.
    """
    if host.name == here.name:
        return find_engine_command(command, environ)
    if host.executables is None:
        return None
    name = PurePath(command).name
    problem = f"its agent does not allow it: start that with --allow-executable {name}"
    return host.executables.get(name, EngineCommand(problem=problem))


def unverified_because(
    settings: EngineSettings,
    environ: Mapping[str, str],
    model: Model,
    hosts: Collection[ResolvedHost],
    here: ResolvedHost,
) -> str:
    """Return why an engine of vLLM uses pulled blocks unproven; empty: it proves them.

    ``hosts``: those of the engines.
    """
    command, unknown = settings.engine_command, ""
    for host in hosts:
        found = engine_command_on(host, here, command, environ)
        # Of a host whose agent has not joined nothing is known but what is installed here.
        version = (found or find_engine_command(command, environ)).version
        if version is None and found is not None:
            return f"the version of {command} is not known"
        if version is None:
            unknown = f"the version of {command} on {host.name} is not known: {AWAITS_AGENT}"
        elif not is_supported(version):
            return f"it is vLLM {version}, and {', '.join(SUPPORTED_VERSIONS)} can be verified"
    if model.error is not None:
        return "the layers of the model are not known"
    if model.unproven:
        return model.unproven
    if model.shape is not None and any(window is not None for window in model.shape.layer_windows):
        return HYBRID
    for name in settings.engine_args:
        if long_name(name) in _SPLITTING:
            return f"engine_args has {name}"
    return unknown
