"""What one engine is once everything has been resolved; the supervisor writes it, the engine's
processes read it.
"""

from __future__ import annotations

from typing import Literal

from pdlaunch.config.models import (
    FrozenModel,
    KVOffloadSettings,
    KVTransferSettings,
    LimitSettings,
    LoadFormat,
    Role,
)

ENGINE_HOST = "127.0.0.1"
"""Engines listen here for their router."""


class EngineSpec(FrozenModel):
    """One engine: a server process and ``tensor_parallel_size`` ranks. No field is left to be
    derived.
    """

    name: str
    """``prefill-0``, ``decode-1``: unique in the launch, stable over restarts."""
    role: Role
    model_dir: str
    """Directory in Hugging Face layout with config.json, tokenizer.json and weights."""
    served_model_name: str
    load_format: LoadFormat
    dtype: Literal["float32", "bfloat16", "float16"]
    max_model_len: int
    block_size: int
    kv_cache_memory_bytes: int | None
    """Of one rank; None: the rank takes gpu_memory_utilization of its device."""
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    enable_cumem_allocator: bool
    enable_sleep_mode: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    device: Literal["cpu", "cuda"]
    device_indices: tuple[int, ...]
    """CUDA device of each rank; empty on a CPU."""
    tensor_parallel_size: int
    num_threads: int
    kv_transfer: KVTransferSettings
    limits: LimitSettings
    kv_offload: KVOffloadSettings = KVOffloadSettings()
    enforce_eager: bool = False
    async_scheduling: bool = False
    """Prepare a step while the one before runs."""
    http_host: str = ENGINE_HOST
    http_port: int = 0
    """0: a free port, registered with the supervisor."""
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
