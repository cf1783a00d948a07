"""From a configuration, a machine and the models' own files to ``EngineSpec``: nothing is left to
be derived after this.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

from pdlaunch.config.aliases import ResolvedModel, resolve_model
from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.memory_options import memory_options
from pdlaunch.config.model_shape import DTYPE_BYTES, ModelShape, read_model_shape
from pdlaunch.config.models import EngineSettings, LaunchConfig, Role
from pdlaunch.config.sizes import parse_size
from pdlaunch.errors import ConfigError
from pdlaunch.platform.facts import Machine
from pdlaunch.resolve.plan import ROLES, Placement

DTypeName = Literal["float32", "bfloat16", "float16"]

CPU_KV_CACHE_BYTES = parse_size("1GiB")
CPU_BATCHED_TOKENS = 512
CUDA_BATCHED_TOKENS = 8192


def resolve_models(config: LaunchConfig) -> dict[Role, ResolvedModel]:
    """Where the model of each role that has engines comes from. Raises ConfigError when one cannot
    be found.
    """
    return {
        role: resolve_model(config.engine_settings(role).model)
        for role in ROLES
        if config.role(role).replicas
    }


def resolve_engines(
    config: LaunchConfig, machine: Machine, models: Mapping[Role, ResolvedModel]
) -> dict[str, EngineSpec]:
    """The spec of every engine by name. All models must have been converted. Raises ConfigError."""
    placement = Placement(config, machine)
    specs: dict[str, EngineSpec] = {}
    for role, model in models.items():
        shape = read_model_shape(model.cache_dir)
        for index in range(config.role(role).replicas):
            spec = _engine(placement, role, index, model, shape)
            specs[spec.name] = spec
    return specs


def served_model_name(config: LaunchConfig) -> str:
    """The name in the API: as set, else the alias, or the name of the directory or file without its
    ending.
    """
    settings = next(config.engine_settings(role) for role in ROLES if config.role(role).replicas)
    path = Path(settings.model).expanduser()
    own = path.stem if path.suffix == ".gguf" else path.resolve().name
    return config.served_model_name or own


def _engine(
    placement: Placement, role: Role, index: int, model: ResolvedModel, shape: ModelShape
) -> EngineSpec:
    config, settings = placement.config, placement.config.engine_settings(role)
    device = placement.device(role)
    memory = memory_options(settings)
    on_cpu = device == "cpu"
    return EngineSpec.of(
        config,
        role,
        name=f"{role}-{index}",
        model_dir=str(model.cache_dir),
        served_model_name=served_model_name(config),
        dtype=_dtype(settings, shape, device, placement.machine),
        max_model_len=_max_model_len(settings, shape),
        kv_cache_memory=settings.kv_cache_memory or (CPU_KV_CACHE_BYTES if on_cpu else None),
        enable_cumem_allocator=memory.cumem_allocator,
        max_num_batched_tokens=settings.max_num_batched_tokens
        or (CPU_BATCHED_TOKENS if on_cpu else CUDA_BATCHED_TOKENS),
        device=device,
        device_indices=placement.device_indices(role, index),
        tensor_parallel_size=config.role(role).tensor_parallel_size,
        num_threads=placement.num_threads(role),
        async_scheduling=settings.async_scheduling and not on_cpu,
        http_port=config.role(role).port and config.role(role).port + index,
    )


def _dtype(
    settings: EngineSettings, shape: ModelShape, device: Literal["cpu", "cuda"], machine: Machine
) -> DTypeName:
    """``auto``: the checkpoint's, but float32 where the CPU would emulate a 16-bit type (measured:
    6 times slower prefill).
    """
    if settings.dtype != "auto":
        return settings.dtype
    if shape.dtype not in DTYPE_BYTES:
        return "float32"
    emulated = device == "cpu" and not machine.has_native_bf16
    return "float32" if emulated else cast("DTypeName", shape.dtype)


def _max_model_len(settings: EngineSettings, shape: ModelShape) -> int:
    limit = shape.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > limit:
        raise ConfigError(
            f"max_model_len is over the model's {limit} positions",
            field="max_model_len",
            value=settings.max_model_len,
            fix=f"set it to {limit} or less, or leave it out",
        )
    return settings.max_model_len or limit
