"""Holds the resolved settings of one engine: the supervisor writes them, the engine's processes
read.
"""

from __future__ import annotations

from typing import Literal, Self

from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import PAIR, Role
from pdlaunch.config.shared_settings import SharedSettings

ENGINE_HOST = "127.0.0.1"  # Engines listen here for their router


class EngineSpec(SharedSettings, EngineSettings):
    """Describes one engine: a server process and ``tensor_parallel_size`` ranks.

    It has every setting of an engine. Those whose default is left to the machine or the model are
    declared again without one, so that no value is left to be derived.
    """

    name: str  # ``prefill-0``, ``decode-1``: unique in the launch, stable over restarts
    role: Role
    # The directory in Hugging Face layout with config.json, tokenizer.json and weights
    model_dir: str
    served_model_name: str
    dtype: Literal["float32", "bfloat16", "float16"]
    max_model_len: int
    enable_cumem_allocator: bool
    max_num_batched_tokens: int
    device: Literal["cpu", "cuda"]
    device_indices: tuple[int, ...]  # The CUDA device of each rank; empty on a CPU
    tensor_parallel_size: int
    num_threads: int
    async_scheduling: bool = False  # Always off on a CPU
    # A rank that sizes its KV cache by gpu_memory_utilization sets this aside for a step
    activation_bytes: int = 0
    bind_address: str = ENGINE_HOST  # The server and the side channels of the ranks listen here
    advertise_address: str = ENGINE_HOST  # Ranks tell their peers to connect here
    http_port: int = 0  # 0 takes a free port, which is registered with the supervisor

    @property
    def has_peers(self) -> bool:
        """Return whether it lends KV blocks to engines of another role, or pulls theirs."""
        return self.role in PAIR

    @classmethod
    def of(cls, config: LaunchConfig, role: Role, **resolved: object) -> Self:
        """Return the spec of an engine of ``role``: its settings below the ``resolved`` values."""
        # Ranks have `env` as their environment; the server has no use for what may be secrets.
        # Last wins: derived values over settings of the role, and these over the launch's.
        settings = (
            dict(config) | dict(config.engine_settings(role)) | {"env": {}, "role": role} | resolved
        )
        return cls.model_validate(
            {name: settings[name] for name in cls.model_fields if name in settings}
        )
