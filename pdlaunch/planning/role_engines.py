"""Derives what the settings of a role come to on a host: devices, sizes, memory, environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

from pydantic import JsonValue

from pdlaunch.config.connectors import VLLM_NIXL, KVNetwork
from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.engine_spec import ENGINE_HOST
from pdlaunch.config.field_types import set_paths
from pdlaunch.config.model_files.shape import DTYPE_BYTES, ModelShape
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import PAIR, Role
from pdlaunch.config.sizes import parse_size
from pdlaunch.config.vllm_arguments import long_name
from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.machine.host import expandable_segments_variable
from pdlaunch.machine.visible_gpus import VISIBLE_DEVICES, VisibleGpus, visible_gpus
from pdlaunch.planning.footprint import Footprint, make_footprint, outline_of_shape
from pdlaunch.planning.hosts import DeviceKind, ResolvedHost
from pdlaunch.planning.models import Model

DTypeName = Literal["float32", "bfloat16", "float16"]
Allocator = Literal["host", "cuda", "cumem", "expandable_segments"]  # allocators of KV caches

# Flags of vLLM that make the size of weights or KV unpredictable
_RESIZING = ("cpu-offload-gb", "hf-overrides")
# Bits of a number in vLLM's KV cache, by the beginning of its dtype; 4 for others
_KV_BITS = {"auto": 16, "float16": 16, "bfloat16": 16, "fp8": 8, "int8": 8}
CPU_KV_CACHE_BYTES = parse_size("1GiB")
CPU_BATCHED_TOKENS = 512
CUDA_BATCHED_TOKENS = 8192
VLLM_BATCHED_TOKENS = 2048  # the least of its defaults


@dataclass(frozen=True, eq=False)
class RoleEngines:
    """Describes the engines of one role: all of them, or those of a host.

    All of a role are alike, but for what follows from the host; of all of them, this is as it is on
    the first one's host.

    None stands for what is not known: of a model that cannot be read or is yet to be converted, of
    settings that contradict each other, or of a device's free memory, known only at start.
    """

    config: LaunchConfig
    role: Role
    on: ResolvedHost
    model: Model
    replicas: int
    num_neighbours: int  # ranks of all roles on the host, which share its cores
    # Number of ranks that are placed on the same GPUs of the host before those of this role
    first_gpu_rank: int
    has_far_peers: bool = False  # ranks of the launch exchange KV blocks with ranks on other hosts

    # Given by the settings, the host and the model.

    @cached_property
    def settings(self) -> EngineSettings:
        """Return the settings as written, the role's own section over the top level."""
        return self.config.engine_settings(self.role)

    @cached_property
    def overrides(self) -> frozenset[str]:
        return frozenset(set_paths(self.config.role(self.role)))

    @property
    def given(self) -> frozenset[str]:
        return self.overrides | self.config.model_fields_set

    @cached_property
    def given_environ(self) -> Mapping[str, str]:
        """Return the user's environment of a rank: the supervisor's, and ``env`` over it."""
        return {**self.on.environ, **self.settings.env}

    @property
    def ports(self) -> range:
        return self.config.role(self.role).ports()

    @property
    def tp_size(self) -> int:
        return self.settings.tensor_parallel_size

    @property
    def num_ranks(self) -> int:
        """Return the ranks of all these engines; on a host, those that run there."""
        return self.replicas * self.settings.ranks_per_node

    @property
    def host(self) -> str:
        return self.on.name

    @property
    def machine(self) -> Machine:
        return self.on.machine

    @property
    def shape(self) -> ModelShape | None:
        return self.model.shape

    @property
    def is_native(self) -> bool:
        return self.settings.engine == "native"

    @property
    def unverified(self) -> str:
        """Return why pulled KV blocks are used unproven; empty: they are proven before use."""
        transfer = self.config.kv_transfer
        if self.role not in PAIR:
            return ""
        if transfer.is_stock:
            return f"kv_transfer.connector is {VLLM_NIXL}"
        return "" if transfer.verify else "kv_transfer.verify is off"

    @property
    def host_tier_bytes(self) -> int:
        """Return the host memory of one rank for KV blocks; 0: no host tier."""
        return self.settings.kv_offload.host_memory

    @property
    def block_size(self) -> int | None:
        """Return the tokens in a KV block; None: the engine is not native and chooses by itself."""
        is_known = self.is_native or "block_size" in self.given
        return self.settings.block_size if is_known else None

    @cached_property
    def arguments(self) -> Mapping[str, JsonValue]:
        """Return the flags of vLLM that ``engine_args`` gives, by their long names."""
        return {long_name(key): value for key, value in self.settings.engine_args.items()}

    def has_argument(self, *names: str) -> bool:
        """Return whether ``engine_args`` gives one of these flags of vLLM."""
        return not self.arguments.keys().isdisjoint(names)

    def where(self, name: str) -> str:
        """Return the dotted path that decides a setting: the role's section or the top level."""
        return f"{self.role}.{name}" if name in self.overrides else name

    # Derived values.

    @cached_property
    def _visible(self) -> VisibleGpus:
        return visible_on(self.on, self.settings)

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Return the GPUs that its ranks see, which number them from 0: all of the machine, or
        those that their own CUDA_VISIBLE_DEVICES names.
        """
        return self._visible.gpus

    @property
    def gpus_problem(self) -> str:
        return self._visible.problem

    @cached_property
    def device(self) -> DeviceKind:
        return device_kind(self.settings, self.machine, self._visible)

    @cached_property
    def dtype(self) -> DTypeName | None:
        """Return the dtype; ``auto`` is the checkpoint's.

        But float32 where the CPU would emulate a 16-bit type (measured: 6 times slower prefill).
        """
        if self.settings.dtype != "auto":
            return self.settings.dtype
        if self.device == "cpu" and not self.machine.has_native_bf16:
            return "float32"
        if self.shape is None or self.shape.is_outline:
            return None
        match self.shape.dtype:
            case "bfloat16" | "float16":
                return self.shape.dtype
            case _:
                return "float32"

    @property
    def max_model_len(self) -> int | None:
        """Return the longest request, which is cut to the length that the model was made for."""
        if self.shape is None:
            return self.settings.max_model_len
        limit = self.shape.max_position_embeddings
        return min(self.settings.max_model_len or limit, limit)

    @property
    def max_num_batched_tokens(self) -> int:
        default = CPU_BATCHED_TOKENS if self.device == "cpu" else CUDA_BATCHED_TOKENS
        return self.settings.max_num_batched_tokens or default

    @property
    def kv_cache_bytes(self) -> int | None:
        """Return the KV cache of one rank; None: what the device has left, known only at start."""
        if self.device != "cpu":
            return self.settings.kv_cache_memory
        num_bytes = self.settings.kv_cache_memory or CPU_KV_CACHE_BYTES
        return num_bytes if self.is_native else whole_gibibytes(num_bytes)

    @property
    def num_threads(self) -> int:
        """Return the CPU threads of one rank: an even share of the host's cores."""
        share = max(1, self.machine.num_cpus // self.num_neighbours)
        return self.settings.num_threads or share

    @property
    def async_scheduling(self) -> bool:
        # A CPU computes the step itself: nobody is free to prepare the next one meanwhile.
        return self.settings.async_scheduling and self.device != "cpu"

    @property
    def cumem_allocator(self) -> bool | None:
        """Return whether memory comes from CuMem pools, which sleep mode turns on.

        None: sleep mode is on, and the pools are switched off by name.
        """
        asked = self.settings.enable_cumem_allocator
        if self.settings.enable_sleep_mode:
            return None if asked is False else True
        return asked is True

    @property
    def allocator(self) -> Allocator:
        """Return what allocates the KV cache."""
        if self.device == "cpu":
            return "host"
        if self.cumem_allocator:
            return "cumem"
        is_expandable = expandable_segments_variable(self.given_environ)
        return "expandable_segments" if is_expandable else "cuda"

    @cached_property
    def footprint(self) -> Footprint | None:
        """Return the memory of one rank; of one of vLLM, what it needs at least."""
        shape, dtype = self.shape, self.dtype
        if not self.is_native:
            return self._vllm_footprint()
        if shape is None or dtype is None or self.max_model_len is None:
            return None
        return make_footprint(
            shape,
            self.settings,
            tp_size=self.tp_size,
            device=self.device,
            dtype=dtype,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_bytes=self.kv_cache_bytes,
        )

    def _vllm_footprint(self) -> Footprint | None:
        shape, given = self.shape, self.arguments
        if shape is None or self.max_model_len is None or self.has_argument(*_RESIZING):
            return None
        outline, dtype_bytes = outline_of_shape(shape), DTYPE_BYTES[self.dtype or "bfloat16"]
        weight_bytes = outline.weight_bytes(
            dtype_bytes,
            self.tp_size,
            dp_size=self.settings.data_parallel_size,
            quantization=given.get("quantization"),
            by_expert=bool(given.get("enable-expert-parallel")),
        )
        if weight_bytes is None:
            return None
        told = str(given.get("kv-cache-dtype", "auto"))
        bits = next((_KV_BITS[name] for name in _KV_BITS if told.startswith(name)), 4)
        if told == "auto":
            bits = 8 if outline.has_small_kv else 8 * dtype_bytes
        return Footprint(
            weight_bytes=weight_bytes,
            activation_bytes=0,
            max_model_len=self.max_model_len,
            kv_cache_bytes=self.kv_cache_bytes,
            kv_bytes_for=partial(
                outline.kv_bytes,
                kv_bits=bits,
                tp_size=self.tp_size,
                num_batched_tokens=self.settings.max_num_batched_tokens or VLLM_BATCHED_TOKENS,
            ),
        )

    @property
    def num_blocks(self) -> int | None:
        """Return the KV blocks of one rank; None: known only at start."""
        return None if self.footprint is None else self.footprint.num_blocks

    def derived(self) -> dict[str, object]:
        """Return the settings that are derived where they are not set, by name.

        None for what engines that are not native choose by themselves.
        """
        own = self.is_native
        return {
            "device": self.device,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.max_num_batched_tokens
            if own
            else self.settings.max_num_batched_tokens,
            "kv_cache_memory": self.kv_cache_bytes,
            "num_threads": self.num_threads,
            "async_scheduling": self.async_scheduling
            if own or not self.settings.async_scheduling
            else None,
            "enable_cumem_allocator": self.cumem_allocator,
        }

    @cached_property
    def environment(self) -> Mapping[str, str]:
        """Return the variables that are set for a rank over the supervisor's environment."""
        common = {
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(self.num_threads),
            "MKL_NUM_THREADS": str(self.num_threads),
            # Models are folders by now; a rank that asks a hub would only wait for a time-out.
            "HF_HUB_OFFLINE": self.given_environ.get("HF_HUB_OFFLINE", "1"),
        }
        transfer, env, network = self.config.kv_transfer, self.settings.env, None
        if self.has_far_peers and transfer.trusted_network:
            devices = self.machine.rdma_devices
            network = KVNetwork(self.on.bind_address, transfer.data_ports, devices)
        given = common | env
        if not self.is_native:
            cpu_bytes = self.kv_cache_bytes if self.device == "cpu" else None
            address = ENGINE_HOST if network is None else network.address
            own = vllm_environment(cpu_bytes, self.settings, address)
            if self.settings.nnodes > 1:
                # Sidecars replace the address by the name of its device.
                names = [each for each in DEVICES_BETWEEN_HOSTS if each not in self.on.environ]
                own |= dict.fromkeys(("VLLM_HOST_IP", *names), self.on.bind_address)
            given = common | own | env | {name: own[name] for name in OWN_VARIABLES}
        if self.role not in PAIR:
            return given
        # NIXL refuses a UCX_TLS without CUDA on a host with GPUs, even to ranks on the CPU.
        has_gpus = self.machine.gpus or self.machine.has_hidden_gpus
        device: DeviceKind = "cuda" if has_gpus else self.device
        # Last: what the connector needs narrows what the user has set.
        carrier = transfer.connector_section.environment(self.given_environ, device, network)
        return given | carrier

    @property
    def ucx_transports(self) -> tuple[str, ...]:
        """Return the transports that UCX may use in a rank; empty without UCX."""
        return tuple(self.environment.get("UCX_TLS", "").split(","))

    # Single engines, and the devices of their ranks.

    def engine_name(self, index: int) -> str:
        """Return the name of one engine, unique in the launch and stable over restarts."""
        return f"{self.role}-{index}"

    def http_port(self, index: int) -> int:
        """Return the HTTP port of one engine; 0: a free one, registered with the supervisor."""
        return self.ports.start + index if self.ports else 0

    def device_indices(self, first: int, num_ranks: int) -> tuple[int, ...]:
        """Return the CUDA devices of ranks of this role on the host, as they number them; empty on
        a CPU or without GPUs.

        ``first``: how many ranks of the role the host has before them. GPUs are dealt out in turn
        over the ranks of all engines on the host that see the same, in the order of ``ROLES``.
        """
        num_gpus = len(self.gpus)
        if self.device == "cpu" or not num_gpus:
            return ()
        begin = self.first_gpu_rank + first
        return tuple((begin + place) % num_gpus for place in range(num_ranks))

    def num_ranks_on(self, gpu: int) -> int:
        """Return how many ranks of these engines ``device_indices`` puts on a GPU."""
        place = next((place for place, each in enumerate(self.gpus) if each.index == gpu), None)
        if self.device == "cpu" or place is None:
            return 0
        # Counted, not listed: settings may name a million ranks, and checks still answer at once.
        # Of 3 GPUs, GPU 1 has ranks 1, 4, 7, ..: of ranks 0 to 7 these are (8 - 1 + 2) // 3 = 3.
        num_gpus = len(self.gpus)
        ends = (self.first_gpu_rank, self.first_gpu_rank + self.num_ranks)
        before, all_of_them = (max(0, (end - place + num_gpus - 1) // num_gpus) for end in ends)
        return all_of_them - before


def visible_on(host: ResolvedHost, settings: EngineSettings) -> VisibleGpus:
    """Return the GPUs that ranks with these settings see on a host."""
    own = {**host.environ, **settings.env}.get(VISIBLE_DEVICES)
    return visible_gpus(host.machine.gpus, host.environ.get(VISIBLE_DEVICES), own)


def device_kind(settings: EngineSettings, machine: Machine, visible: VisibleGpus) -> DeviceKind:
    """Return the device that ranks with these settings run on."""
    if settings.device != "auto":
        return settings.device
    # A variable that is wrong must not turn the role into one on the CPU.
    return "cuda" if visible.gpus or (visible.problem and machine.gpus) else "cpu"


# Engines of vLLM

GIBIBYTE = 1024**3


def whole_gibibytes(num_bytes: int) -> int:
    """Return the size of the KV cache that vLLM makes of ``num_bytes`` on a CPU."""
    return max(1, num_bytes // GIBIBYTE) * GIBIBYTE


# Variables of vLLM that are pdlaunch's alone: `env` cannot set them
OWN_VARIABLES = frozenset(
    {
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
        "VLLM_NIXL_SIDE_CHANNEL_HOST",
        "VLLM_SERVER_DEV_MODE",
    }
)


# Variables that name the network device between the hosts of an engine
DEVICES_BETWEEN_HOSTS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def vllm_environment(
    kv_cache_bytes: int | None, settings: EngineSettings, side_channel_host: str
) -> dict[str, str]:
    """Return the variables for ``vllm serve``; those of the user go over them, but over
    ``OWN_VARIABLES``.

    ``kv_cache_bytes``: of one rank on a CPU; None on a GPU.
    """
    common = {
        # It would report model, hardware and settings to its makers.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # The address that its side channel binds, and tells decode engines.
        "VLLM_NIXL_SIDE_CHANNEL_HOST": side_channel_host,
        # Two requests under one id would end the engine: leases bear the ids of their requests.
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "0",
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
