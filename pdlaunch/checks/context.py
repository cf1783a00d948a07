"""What the rules look at: a configuration, the engines it describes, and a machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from pdlaunch.checks.transport_report import TransportReport
from pdlaunch.config.model_shape import DTYPE_BYTES, ModelShape
from pdlaunch.config.models import EngineSettings, LaunchConfig, Role
from pdlaunch.config.sizes import parse_size
from pdlaunch.config.sources import Origin
from pdlaunch.errors import ConfigError
from pdlaunch.platform.facts import Fact, Machine, PortState

ROLES: tuple[Role, ...] = get_args(Role)

Need = Fact | Literal["model", "ports", "imports", "folders", "weights", "transport"]

CPU_KV_CACHE_BYTES = parse_size("1GiB")
CPU_BATCHED_TOKENS = 512
CUDA_BATCHED_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of a role's model before anything runs."""

    path: str | None = None
    """The directory that is served."""
    shape: ModelShape | None = None
    error: ConfigError | None = None
    """Why it cannot be served."""
    pending: str = ""
    """Why its shape is not known yet."""


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """The engines of one role; they are all alike."""

    role: Role
    replicas: int
    tp_size: int
    settings: EngineSettings
    overrides: frozenset[str]
    """Settings that the role's own section gives."""
    device: Literal["cpu", "cuda"]
    has_native_bf16: bool
    model: Model
    environ: Mapping[str, str]
    """Of its ranks."""

    @property
    def shape(self) -> ModelShape | None:
        return self.model.shape

    @property
    def num_ranks(self) -> int:
        return self.replicas * self.tp_size

    @property
    def dtype(self) -> str | None:
        """None: the model's own, which is not known."""
        if self.settings.dtype != "auto":
            return self.settings.dtype
        if self.device == "cpu" and not self.has_native_bf16:
            return "float32"
        if self.shape is None:
            return None
        return self.shape.dtype if self.shape.dtype in DTYPE_BYTES else "float32"

    @property
    def max_model_len(self) -> int | None:
        return self.settings.max_model_len or (
            self.shape.max_position_embeddings if self.shape else None
        )

    @property
    def max_num_batched_tokens(self) -> int:
        return self.settings.max_num_batched_tokens or (
            CPU_BATCHED_TOKENS if self.device == "cpu" else CUDA_BATCHED_TOKENS
        )

    @property
    def kv_cache_bytes(self) -> int | None:
        """Of one rank; None: what the device has left."""
        return self.settings.kv_cache_memory or (
            CPU_KV_CACHE_BYTES if self.device == "cpu" else None
        )

    @property
    def host_tier_bytes(self) -> int:
        """Host memory of one rank for KV blocks; 0: no host tier."""
        return self.settings.kv_offload.host_memory

    def where(self, name: str) -> str:
        """Dotted path of the place that decides a setting: the role's section, or the top level."""
        return f"{self.role}.{name}" if name in self.overrides else name


@dataclass(frozen=True, slots=True)
class Listener:
    """An address that the launch listens on for others."""

    name: str
    host: str
    port: int
    where: str
    """Dotted path of the port."""


@dataclass(frozen=True, slots=True)
class Context:
    """Everything that a rule may look at."""

    config: LaunchConfig
    origins: Mapping[str, Origin]
    machine: Machine
    environ: Mapping[str, str]
    engines: Mapping[Role, Engine]
    """Roles that have engines."""
    listeners: tuple[Listener, ...] = ()
    ports: Mapping[tuple[str, int], PortState] = field(default_factory=dict)
    hosts: tuple[str, ...] = ("localhost",)
    """Machines that the launch runs on."""
    side_channel_host: str = "127.0.0.1"
    """Address that ranks give to their peers."""
    import_errors: Mapping[str, str] = field(default_factory=dict)
    """Modules whose import was tried and failed, and why."""
    folder_problems: Mapping[str, str] = field(default_factory=dict)
    """By setting: why its folder cannot be written to."""
    weight_errors: Mapping[Role, ConfigError] = field(default_factory=dict)
    """Why the engines of a role could not read their weights."""
    transport: TransportReport | None = None
    missing: Mapping[Need, str] = field(default_factory=dict)
    """Facts that are not known, and why."""

    def given(self, path: str) -> bool:
        """The user has set this, be it to its default."""
        return (
            self.origins[path].kind in ("flag", "environment", "file")
            if path in self.origins
            else False
        )

    def where_variable(self, engine: Engine, name: str) -> str:
        """The setting that gives a variable to an engine's ranks, else the environment of this
        command.
        """
        paths = (f"{engine.role}.env.{name}", f"env.{name}")
        return next((path for path in paths if self.given(path)), f"environment {name}")

    def on(self, device: Literal["cpu", "cuda"]) -> Iterator[Engine]:
        """Engines on this kind of device."""
        return (engine for engine in self.engines.values() if engine.device == device)

    def pair(self) -> tuple[Engine, Engine] | None:
        """The prefill and the decode side, where there are both."""
        prefill, decode = self.engines.get("prefill"), self.engines.get("decode")
        return (prefill, decode) if prefill and decode else None

    def shapes(self) -> Iterator[tuple[Engine, ModelShape]]:
        """Engines whose model is known."""
        return (
            (engine, engine.shape) for engine in self.engines.values() if engine.shape is not None
        )
