"""Derives the values of a role's engines on a host: devices, sizes, memory, environment."""

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
from pdlaunch.engine.kvcache import groups
from pdlaunch.machine.facts import VISIBLE_DEVICES, Gpu, Machine, VisibleGpus, visible_gpus
from pdlaunch.machine.host import expandable_segments_variable
from pdlaunch.planning.footprint import Footprint, outline_of_shape, weights_of_rank
from pdlaunch.planning.models import Model
from pdlaunch.planning.plan import DeviceKind, ResolvedHost

DTypeName = Literal["float32", "bfloat16", "float16"]
Allocator = Literal["host", "cuda", "cumem", "expandable_segments"]  # allocators of KV caches

# Flags of vLLM with which the size of weights or KV is not known
_RESIZING = ("cpu-offload-gb", "hf-overrides")
# Bits of a number in vLLM's KV cache, by the prefix of kv-cache-dtype; 4 for other dtypes
_KV_BITS = {"auto": 16, "float16": 16, "bfloat16": 16, "fp8": 8, "int8": 8}
# Times hidden_size + intermediate_size; reserved if gpu_memory_utilization sizes the KV cache
CUDA_ACTIVATION_BYTES_PER_TOKEN = 64
CPU_KV_CACHE_BYTES = parse_size("1GiB")
CPU_BATCHED_TOKENS = 512
CUDA_BATCHED_TOKENS = 8192
VLLM_BATCHED_TOKENS = 2048  # the smallest of vLLM's defaults


@dataclass(frozen=True, eq=False)
class RoleEngines:
    """Describes all engines of one role, or those on one host.

    Engines of a role differ only in values that depend on their host; an object for all engines has
    the values of the first engine's host. Unknown values are None: if the model cannot be read yet,
    if settings contradict each other, or if they depend on a device's free memory after start.
    """

    config: LaunchConfig
    role: Role
    on: ResolvedHost
    model: Model
    replicas: int
    num_neighbours: int  # number of ranks of all roles on the host, which share its cores
    # Number of ranks of earlier roles on the same GPUs of the host
    first_gpu_rank: int
    has_far_peers: bool = False  # some pair of the launch has its engines on different hosts

    # Values from the settings, the host and the model.

    @cached_property
    def settings(self) -> EngineSettings:
        """Return the role's section over the top level, with nothing derived."""
        return self.config.engine_settings(self.role)

    @cached_property
    def overrides(self) -> frozenset[str]:
        return frozenset(set_paths(self.config.role(self.role)))

    @property
    def given(self) -> frozenset[str]:
        return self.overrides | self.config.model_fields_set

    @cached_property
    def given_environ(self) -> Mapping[str, str]:
        return {**self.on.environ, **self.settings.env}

    @property
    def ports(self) -> range:
        return self.config.role(self.role).ports()

    @property
    def tp_size(self) -> int:
        return self.settings.tensor_parallel_size

    @property
    def num_ranks(self) -> int:  # on their host
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
        """Return the reason why pulled KV blocks are not proven; empty if they are proven."""
        transfer = self.config.kv_transfer
        if self.role not in PAIR:
            return ""
        if transfer.is_stock:
            return f"kv_transfer.connector is {VLLM_NIXL}"
        return "" if transfer.verify else "kv_transfer.verify is off"

    @property
    def host_tier_bytes(self) -> int:
        return self.settings.kv_offload.host_memory

    @property
    def block_size(self) -> int | None:
        is_known = self.is_native or "block_size" in self.given
        return self.settings.block_size if is_known else None

    @cached_property
    def arguments(self) -> Mapping[str, JsonValue]:
        return {long_name(key): value for key, value in self.settings.engine_args.items()}

    def has_argument(self, *names: str) -> bool:
        return not self.arguments.keys().isdisjoint(names)

    def where(self, name: str) -> str:
        """Return the dotted path of a setting: in the role's section if it is set there."""
        return f"{self.role}.{name}" if name in self.overrides else name

    # Derived values.

    @cached_property
    def _visible(self) -> VisibleGpus:
        return visible_on(self.on, self.settings)

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Return the GPUs that ranks see (``CUDA_VISIBLE_DEVICES``), which ranks number from 0."""
        return self._visible.gpus

    @property
    def gpus_problem(self) -> str:
        return self._visible.problem

    @cached_property
    def device(self) -> DeviceKind:
        return device_kind(self.settings, self.machine, self._visible)

    @cached_property
    def dtype(self) -> DTypeName | None:
        """Return the dtype, which for ``auto`` is the checkpoint's."""
        if self.settings.dtype != "auto":
            return self.settings.dtype
        # A CPU that emulates 16-bit types computes prompts 6 times slower.
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
        if self.shape is None:
            return self.settings.max_model_len
        limit = self.shape.max_position_embeddings
        return min(self.settings.max_model_len or limit, limit)

    @property
    def max_num_batched_tokens(self) -> int:
        default = CPU_BATCHED_TOKENS if self.device == "cpu" else CUDA_BATCHED_TOKENS
        default = default if self.is_native else VLLM_BATCHED_TOKENS
        return self.settings.max_num_batched_tokens or default

    @property
    def kv_cache_bytes(self) -> int | None:
        """Return the bytes of one rank's KV cache; None if the rank takes the free GPU memory."""
        if self.device != "cpu":
            return self.settings.kv_cache_memory
        num_bytes = self.settings.kv_cache_memory or CPU_KV_CACHE_BYTES
        # VLLM takes whole GiB on a CPU.
        return num_bytes if self.is_native else max(1, num_bytes // GIBIBYTE) * GIBIBYTE

    @property
    def num_threads(self) -> int:
        share = max(1, self.machine.num_cpus // self.num_neighbours)
        return self.settings.num_threads or share

    @property
    def async_scheduling(self) -> bool:
        # On a CPU, the cores run the step, so preparing the next one gains nothing.
        return self.settings.async_scheduling and self.device != "cpu"

    @property
    def cumem_allocator(self) -> bool | None:
        """Return True for CuMem pools; None if sleep mode needs them and they are off."""
        asked = self.settings.enable_cumem_allocator
        if self.settings.enable_sleep_mode:
            return None if asked is False else True
        return asked is True

    @property
    def allocator(self) -> Allocator:
        if self.device == "cpu":
            return "host"
        if self.cumem_allocator:
            return "cumem"
        is_expandable = expandable_segments_variable(self.given_environ)
        return "expandable_segments" if is_expandable else "cuda"

    @cached_property
    def footprint(self) -> Footprint | None:
        """Return the memory of one rank (of vLLM a lower bound); None if it is not known."""
        shape, dtype, max_model_len = self.shape, self.dtype, self.max_model_len
        if shape is None or max_model_len is None:
            return None
        if not self.is_native:
            return self._vllm_footprint(shape, max_model_len)
        return None if dtype is None else self._native_footprint(shape, dtype, max_model_len)

    def _native_footprint(self, shape: ModelShape, dtype: str, max_model_len: int) -> Footprint:
        size, num_tokens = DTYPE_BYTES[dtype], self.max_num_batched_tokens
        if self.device == "cuda" and self.kv_cache_bytes is None:
            # The rank reserves exactly these bytes, since gpu_memory_utilization sizes the cache.
            inner = shape.hidden_size + shape.intermediate_size
            activations = num_tokens * inner * CUDA_ACTIVATION_BYTES_PER_TOKEN
        else:
            # An estimate: hidden and inner states, and float32 logits of all running requests.
            inner = 4 * shape.hidden_size + 3 * shape.intermediate_size // self.tp_size
            rows = min(self.settings.max_num_seqs, num_tokens)
            activations = num_tokens * inner * size + rows * shape.vocab_size * 4
        # The rank makes the same layout, so it counts the same number of blocks.
        layout = groups.KVCacheLayout(
            groups.make_groups(shape.layer_windows),
            num_kv_heads=groups.num_kv_heads_of_rank(shape.num_kv_heads, self.tp_size),
            head_dim=shape.head_dim,
            block_size=self.settings.block_size,
            dtype_bytes=size,
        )
        windows = [group.sliding_window for group in layout.groups]
        return Footprint(
            weight_bytes=weights_of_rank(shape, self.tp_size) * size,
            activation_bytes=activations,
            kv_bytes_for=lambda num_tokens: (
                groups.min_blocks(windows, layout.block_size, num_tokens) * layout.block_bytes
            ),
            layout=layout,
            max_model_len=max_model_len,
            kv_cache_bytes=self.kv_cache_bytes,
        )

    def _vllm_footprint(self, shape: ModelShape, max_model_len: int) -> Footprint | None:
        given = self.arguments
        if self.has_argument(*_RESIZING):
            return None
        outline, dtype_bytes = outline_of_shape(shape), DTYPE_BYTES[self.dtype or "bfloat16"]
        weight_bytes = outline.weight_bytes(
            dtype_bytes,
            self.tp_size,
            dp_size=self.settings.data_parallel_size,
            num_stages=self.settings.pipeline_parallel_size,
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
            max_model_len=max_model_len,
            kv_cache_bytes=self.kv_cache_bytes,
            kv_bytes_for=partial(
                outline.kv_bytes,
                kv_bits=bits,
                tp_size=self.tp_size,
                num_stages=self.settings.pipeline_parallel_size,
                num_batched_tokens=self.max_num_batched_tokens,
            ),
        )

    @property
    def num_blocks(self) -> int | None:
        return None if self.footprint is None else self.footprint.num_blocks

    def derived(self) -> dict[str, object]:
        """Return settings with derived defaults, by name; None for values that vLLM chooses."""
        settings, is_vllm = self.settings, not self.is_native
        num_tokens = settings.max_num_batched_tokens if is_vllm else self.max_num_batched_tokens
        is_open = is_vllm and settings.async_scheduling
        return {
            "device": self.device,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": num_tokens,
            "kv_cache_memory": self.kv_cache_bytes,
            "num_threads": self.num_threads,
            "async_scheduling": None if is_open else self.async_scheduling,
            "enable_cumem_allocator": self.cumem_allocator,
        }

    @cached_property
    def environment(self) -> Mapping[str, str]:
        """Return the variables that override the supervisor's environment in a rank."""
        common = {
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(self.num_threads),
            "MKL_NUM_THREADS": str(self.num_threads),
            # Ranks get folders of models, so they need no hub and should not wait for one.
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
                # In the device variables, sidecars replace the address by its device's name.
                names = [each for each in DEVICES_BETWEEN_HOSTS if each not in self.on.environ]
                own |= dict.fromkeys(("VLLM_HOST_IP", *names), self.on.bind_address)
            given = common | own | env | {name: own[name] for name in OWN_VARIABLES}
        if self.role not in PAIR:
            return given
        # On a host with GPUs, NIXL refuses a UCX_TLS without CUDA, even in ranks on the CPU.
        has_gpus = self.machine.gpus or self.machine.has_hidden_gpus
        device: DeviceKind = "cuda" if has_gpus else self.device
        # Apply the connector's variables last: they restrict values of the user, such as UCX_TLS.
        carrier = transfer.connector_section.environment(self.given_environ, device, network)
        return given | carrier

    @property
    def ucx_transports(self) -> tuple[str, ...]:
        return tuple(self.environment.get("UCX_TLS", "").split(","))

    # Single engines, and the devices of their ranks.

    def http_port(self, index: int) -> int:
        """Return the HTTP port of one engine; 0 if its server takes and registers a free port."""
        return self.ports.start + index if self.ports else 0

    def device_indices(self, first: int, num_ranks: int) -> tuple[int, ...]:
        """Return the CUDA devices of ``num_ranks`` ranks, as the ranks number them.

        ``first``: number of ranks of this role on the host before these. Ranks that see the same
        GPUs get them in turn, in the order of ``ROLES``. Empty on a CPU or without GPUs.
        """
        num_gpus = len(self.gpus)
        if self.device == "cpu" or not num_gpus:
            return ()
        begin = self.first_gpu_rank + first
        return tuple((begin + place) % num_gpus for place in range(num_ranks))

    def num_ranks_on(self, gpu: int) -> int:
        """Return the number of these engines' ranks that ``device_indices`` places on a GPU."""
        place = next((place for place, each in enumerate(self.gpus) if each.index == gpu), None)
        if self.device == "cpu" or place is None:
            return 0
        # Of 3 GPUs, GPU 1 has ranks 1, 4, 7, ..
        first, num_gpus = self.first_gpu_rank, len(self.gpus)
        begin = first + (place - first) % num_gpus
        return len(range(begin, first + self.num_ranks, num_gpus))


def visible_on(host: ResolvedHost, settings: EngineSettings) -> VisibleGpus:
    """Return the GPUs that ranks with these settings see on a host."""
    own = {**host.environ, **settings.env}.get(VISIBLE_DEVICES)
    return visible_gpus(host.machine.gpus, host.environ.get(VISIBLE_DEVICES), own)


def device_kind(settings: EngineSettings, machine: Machine, visible: VisibleGpus) -> DeviceKind:
    """Return the kind of device that ranks with these settings run on."""
    if settings.device != "auto":
        return settings.device
    # A mistake in CUDA_VISIBLE_DEVICES must not move the role to the CPU.
    return "cuda" if visible.gpus or (visible.problem and machine.gpus) else "cpu"


# Engines of vLLM

GIBIBYTE = 1024**3


# Variables of vLLM that only pdlaunch sets: `env` cannot override them
OWN_VARIABLES = frozenset(
    {"VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_SERVER_DEV_MODE"}
)


# Variables that name the network device between the hosts of an engine
DEVICES_BETWEEN_HOSTS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def vllm_environment(
    kv_cache_bytes: int | None, settings: EngineSettings, side_channel_host: str
) -> dict[str, str]:
    """Return the variables for ``vllm serve``. Users may override all but ``OWN_VARIABLES``."""
    common = {
        # By default, vLLM reports model, hardware and settings to its makers.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # The address that vLLM's side channel binds and advertises to decode engines.
        "VLLM_NIXL_SIDE_CHANNEL_HOST": side_channel_host,
        # Two requests with the same id would end the engine: a lease has the id of its request.
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "0",
        # Otherwise vLLM looks up the host's name to connect its own processes.
        "VLLM_HOST_IP": ENGINE_HOST,
        # The InfiniBand module crashes the process in a finaliser at exit (NIXL 1.5.1).
        "UCX_MODULES": "^ib",
        # Adds routes with which any client can run methods in the engine; sleep needs one of them.
        "VLLM_SERVER_DEV_MODE": "1" if settings.enable_sleep_mode else "0",
    }
    if kv_cache_bytes is None:
        return common
    return common | {
        # By default vLLM pins threads to cores, and all engines would use the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_bytes // GIBIBYTE),
    }
