"""The resolved settings of one engine: written by the supervisor, read by the engine."""

from typing import Literal, Self

from pdlaunch.config.engine_settings import EngineSettings
from pdlaunch.config.models import LaunchConfig
from pdlaunch.config.roles import PAIR, Role
from pdlaunch.config.shared_settings import SharedSettings

ENGINE_HOST = "127.0.0.1"  # Engines listen here for their router


class EngineSpec(SharedSettings, EngineSettings):
    """Describes one engine: a server process and its ranks. Settings whose default depends on
    machine or model are declared again as required fields: engine processes derive no values.
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
    # Bytes reserved for one step's activations if gpu_memory_utilization sets the KV cache size
    activation_bytes: int = 0
    bind_address: str = ENGINE_HOST  # The server and the side channels of the ranks listen here
    advertise_address: str = ENGINE_HOST  # Ranks tell their peers to connect here
    http_port: int = 0  # 0: the server takes a free port and reports it to the supervisor

    @property
    def has_peers(self) -> bool:
        """Return True if the engine grants leases to decode engines or pulls from prefill."""
        return self.role in PAIR

    @classmethod
    def of(cls, config: LaunchConfig, role: Role, **resolved: object) -> Self:
        """Return the spec of an engine of ``role``. ``resolved`` values override its settings."""
        # The later mapping wins: ``resolved`` over settings of the role over those of the launch.
        # `env` is emptied: ranks get it as their environment, and it may hold secrets.
        settings = (
            dict(config) | dict(config.engine_settings(role)) | {"env": {}, "role": role} | resolved
        )
        return cls.model_validate(
            {name: settings[name] for name in cls.model_fields if name in settings}
        )
