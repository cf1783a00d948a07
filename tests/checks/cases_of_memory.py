"""For each rule on memory (PD2xx): where it fires, and near misses."""

from dataclasses import replace

from pdlaunch.config.model_files.outline import outline_of
from tests.checks.contexts import (
    CPU,
    EXPANDABLE,
    GB200,
    GIB,
    GPU,
    ONE_GPU,
    SHAPE,
    TIER,
    Case,
    gpus,
    on,
)
from tests.config.model_files.test_outline import DEEPSEEK

FILES = {"kv_transfer__connector": "file", "kv_transfer__file__directory": "/kv"}
STOCK = {"engine": "vllm", "kv_transfer__connector": "vllm-nixl"}

OLD = gpus(has_virtual_memory=False)
SMALL, H100 = gpus(memory_bytes=16 * GIB), gpus(memory_bytes=80 * GIB)
HALF_HELD = gpus(free_memory_bytes=70 * GIB)


def deepseek(machine, *, size=None, **config):
    shape = replace(SHAPE, is_latent=True, num_kv_heads=1, outline=outline_of(DEEPSEEK, size))
    return on(machine, engine="vllm", shapes=(shape, shape), **config)


CASES: dict[str, Case] = {
    "PD201": Case(
        on(GPU, enable_sleep_mode=True, enable_cumem_allocator=False),
        on(GPU, enable_cumem_allocator=False, decode__enable_sleep_mode=True),
        quiet=[on(GPU, enable_sleep_mode=True), on(GPU, enable_cumem_allocator=False)],
    ),
    "PD202": Case(
        on(CPU, enable_cumem_allocator=True),
        on(GPU, enable_cumem_allocator=True, decode__device="cpu"),
        on(CPU, enable_sleep_mode=True),
        on(OLD, decode__enable_cumem_allocator=True),
        on(OLD, enable_sleep_mode=True),
        quiet=[
            on(CPU, enable_cumem_allocator=False),
            on(GPU, enable_cumem_allocator=True, decode__enable_sleep_mode=True),
            on(OLD),
        ],
    ),
    "PD204": Case(
        on(GPU, environ=EXPANDABLE),
        on(GPU, environ={}, decode__env=EXPANDABLE),
        on(GPU, environ=EXPANDABLE, kv_transfer__connector="mooncake"),
        on(GPU, environ=EXPANDABLE, decode__device="cpu"),
        on(GPU, environ=EXPANDABLE, engine="vllm", kv_transfer__nixl__path="p2p"),
        quiet=[
            on(CPU, environ=EXPANDABLE),
            on(GPU, environ=EXPANDABLE, kv_transfer__nixl__path="p2p"),
            on(GPU, environ=EXPANDABLE, **FILES),
            on(GPU, environ=EXPANDABLE, enable_cumem_allocator=True),
            on(GPU, environ=EXPANDABLE, enable_sleep_mode=True),
            on(
                GPU,
                environ=EXPANDABLE,
                env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"},
            ),
        ],
    ),
    "PD207": Case(
        on(SMALL),
        on(GPU, kv_cache_memory="130GiB"),
        deepseek(H100, tensor_parallel_size=4),
        deepseek(H100, tensor_parallel_size=4, size=688586727753),
        deepseek(H100, tensor_parallel_size=8),
        quiet=[
            on(SMALL, tensor_parallel_size=2, max_num_batched_tokens=4096),
            on(GPU, kv_cache_memory="100GiB"),
            # What others hold does not count against a rank's share, where both fit.
            on(HALF_HELD, gpu_memory_utilization=0.45),
            deepseek(GPU, prefill__tensor_parallel_size=8, decode__replicas=0, size=688586727753),
            deepseek(H100, tensor_parallel_size=4, engine_args={"cpu-offload-gb": 400}),
        ],
    ),
    "PD208": Case(
        on(CPU, max_model_len=8192, kv_cache_memory="64MiB"),
        on(CPU, kv_cache_memory="1KiB"),
        deepseek(GPU, max_model_len=8192, kv_cache_memory="500MiB"),
        quiet=[
            on(CPU, max_model_len=1024, kv_cache_memory="64MiB"),
            on(CPU, kv_cache_memory="64MiB"),
            deepseek(GPU, max_model_len=8192, kv_cache_memory="600MiB"),
            deepseek(
                GPU,
                max_model_len=8192,
                kv_cache_memory="300MiB",
                engine_args={"kv-cache-dtype": "fp8"},
            ),
        ],
    ),
    "PD210": Case(
        on(ONE_GPU),
        on(ONE_GPU, kv_cache_memory="60GiB"),
        on(ONE_GPU, engine="vllm", kv_cache_memory="9GiB"),
        on(HALF_HELD, engine="vllm", kv_cache_memory="9GiB"),
        quiet=[
            on(ONE_GPU, gpu_memory_utilization=0.45),
            on(ONE_GPU, kv_cache_memory="20GiB"),
            on(GPU),
            on(HALF_HELD, kv_cache_memory="9GiB"),
            on(HALF_HELD, engine="vllm", gpu_memory_utilization=0.45),
            on(ONE_GPU, engine="vllm", kv_cache_memory="9GiB", gpu_memory_utilization=0.01),
        ],
    ),
    "PD222": Case(
        on(GPU, engine="vllm", decode__gpu_memory_utilization=0.98),
        quiet=[
            on(GPU, engine="vllm", gpu_memory_utilization=0.97),
            on(GPU, gpu_memory_utilization=1),
        ],
    ),
    "PD211": Case(
        on(ONE_GPU, gpu_memory_utilization=0.4),
        quiet=[on(GPU, prefill__replicas=4, decode__replicas=4)],
    ),
    "PD212": Case(
        on(CPU, kv_cache_memory="40GiB"),
        on(CPU, decode__replicas=60),
        on(CPU, kv_offload__host_memory="31GiB"),
        on(GPU, **TIER, decode__replicas=8),
        quiet=[
            on(CPU, kv_cache_memory="20GiB"),
            on(CPU, kv_offload__host_memory="28GiB"),
            on(GPU, kv_offload__host_memory="32GiB"),
        ],
    ),
    "PD213": Case(
        on(GPU, enable_cumem_allocator=True, kv_transfer__nixl__path="nixl"),
        on(GPU, prefill__enable_sleep_mode=True, kv_transfer__connector="mooncake"),
        on(GPU, decode__enable_cumem_allocator=True, **STOCK),
        quiet=[
            on(GPU, kv_transfer__nixl__path="nixl"),
            on(GPU, decode__enable_cumem_allocator=True, engine="vllm"),
            on(GB200, enable_cumem_allocator=True, kv_transfer__nixl__path="nixl"),
            on(GPU, enable_cumem_allocator=True),
            on(GPU, enable_cumem_allocator=True, **FILES),
        ],
    ),
    "PD220": Case(
        on(CPU, **TIER, enable_prefix_caching=False),
        quiet=[
            on(CPU, **TIER),
            on(CPU, enable_prefix_caching=False),
            on(CPU, **TIER, decode__kv_offload__host_memory=0),
        ],
    ),
}
