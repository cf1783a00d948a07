"""Describes the engines of one role, as everything after ``resolve`` sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.model_files.shape import ModelShape
from pdlaunch.config.roles import Role
from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.planning.footprint import Footprint
from pdlaunch.planning.hosts import DeviceKind
from pdlaunch.planning.models import Model

DTypeName = Literal["float32", "bfloat16", "float16"]
Allocator = Literal["host", "cuda", "cumem", "expandable_segments"]  # allocators of KV caches

CHOSEN_BY_ENGINE = frozenset(("max_num_batched_tokens", "async_scheduling"))
"""Derived settings that engines which are not native choose by themselves where they are unset."""


@dataclass(frozen=True, slots=True, eq=False)
class RoleEngines:
    """Describes the engines of one role, with every derived value: all of them, or those of a host.

    All of a role are alike, but for what follows from the host; of all of them, this is as it is on
    the first one's host.

    None stands for what is not known: of a model that cannot be read or is yet to be converted, of
    settings that contradict each other, or of a device's free memory, known only at start.
    """

    role: Role
    replicas: int
    tp_size: int
    num_ranks: int  # ranks of all these engines; on a host, those that run there
    settings: EngineSettings  # the settings as written, the role's own section over the top level
    overrides: frozenset[str]  # settings that the role's own section gives
    given: frozenset[str]  # settings that its section or the top level gives
    ports: range  # fixed HTTP ports of the engines; empty when they take free ones

    host: str
    machine: Machine
    bind_address: str  # servers and side channels listen here
    advertise_address: str  # peers are told to connect here

    model: Model
    device: DeviceKind
    gpus: tuple[Gpu, ...]
    """GPUs that its ranks see, which number them from 0: all of the machine, or those that their
    own CUDA_VISIBLE_DEVICES names.
    """
    gpus_problem: str  # the fault of that variable; empty when it has none
    first_gpu_rank: int
    """Number of ranks that are placed on the same GPUs of the host before those of this role."""
    dtype: DTypeName | None
    max_model_len: int | None
    max_num_batched_tokens: int
    kv_cache_bytes: int | None
    """KV cache of one rank; None: what the device has left, known only at start."""
    num_threads: int  # CPU threads of one rank
    async_scheduling: bool
    cumem_allocator: bool | None
    allocator: Allocator  # allocator of the KV cache
    footprint: Footprint | None  # memory of one rank
    unverified: str
    """The reason why pulled KV blocks are used unproven; empty: they are proven before use. It is
    the same for both roles.
    """
    given_environ: Mapping[str, str]
    """The user's environment of a rank: the supervisor's, and ``env`` over it."""
    environment: Mapping[str, str]
    """Variables that are set for a rank over the supervisor's environment."""
    has_far_peers: bool = False  # its ranks exchange KV blocks with ranks on other hosts

    @property
    def shape(self) -> ModelShape | None:
        return self.model.shape

    @property
    def num_blocks(self) -> int | None:
        """Return the KV blocks of one rank; None: known only at start."""
        return None if self.footprint is None else self.footprint.num_blocks

    @property
    def host_tier_bytes(self) -> int:
        """Return the host memory of one rank for KV blocks; 0: no host tier."""
        return self.settings.kv_offload.host_memory

    @property
    def is_native(self) -> bool:
        return self.settings.engine == "native"

    @property
    def block_size(self) -> int | None:
        """Return the tokens in a KV block; None: the engine is not native and chooses by itself."""
        is_known = self.is_native or "block_size" in self.given
        return self.settings.block_size if is_known else None

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

    @property
    def ucx_transports(self) -> tuple[str, ...]:
        """Return the transports that UCX may use in a rank; empty without UCX."""
        return tuple(self.environment.get("UCX_TLS", "").split(","))

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
        """Return how many ranks of all these engines ``device_indices`` puts on a GPU of the
        machine.
        """
        place = next((place for place, each in enumerate(self.gpus) if each.index == gpu), None)
        if self.device == "cpu" or place is None:
            return 0
        # Counted, not listed: settings may name a million ranks, and checks still answer at once.
        end = self.first_gpu_rank + self.num_ranks
        return self._num_dealt(end, place) - self._num_dealt(self.first_gpu_rank, place)

    def where(self, name: str) -> str:
        """Return the dotted path that decides a setting: the role's section or the top level."""
        return f"{self.role}.{name}" if name in self.overrides else name

    def _num_dealt(self, num_ranks: int, gpu: int) -> int:
        """Return how many of the ranks 0 to ``num_ranks`` - 1 are on one of the GPUs they see."""
        # Of 3 GPUs, GPU 1 has ranks 1, 4, 7, ..: of ranks 0 to 7 these are (8 - 1 + 2) // 3 = 3.
        num_gpus = len(self.gpus)
        return max(0, (num_ranks - gpu + num_gpus - 1) // num_gpus)
