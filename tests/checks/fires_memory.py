"""For each rule on memory (PD2xx): a file, flags or variables that fire it, and its fixes."""

from dataclasses import replace

from pdlaunch.machine.facts import Availability, Limits, Machine
from tests.checks.contexts import CPU, GB200, GIB, GPU
from tests.checks.firing import Case, Setup


def with_gpu_memory(gibibytes: int) -> Machine:
    return replace(GPU, gpus=tuple(replace(gpu, memory_bytes=gibibytes * GIB) for gpu in GPU.gpus))


OLD_DRIVER = replace(GPU, cumem=Availability(False, "the driver has no cuMemCreate"))
TWO_GPUS = replace(GPU, gpus=GPU.gpus[:2])
ONE_GPU = replace(GPU, gpus=GPU.gpus[:1])
SMALL_GPUS = with_gpu_memory(16)
GPUS_OF_24 = with_gpu_memory(24)
HELD_GPUS = replace(GPU, gpus=tuple(replace(gpu, free_memory_bytes=20 * GIB) for gpu in GPU.gpus))
HELD_GPU = replace(GPU, gpus=(replace(GPU.gpus[0], free_memory_bytes=100 * GIB),))
LOW_MEMLOCK = replace(GPU, limits=Limits(8 << 20, 65536))
TIER = "kv_offload: {host_memory: 8GiB}\n"
ON_NIXL = "kv_transfer: {nixl: {path: nixl}}\n"

CASES = [
    Case(
        "PD201",
        Setup("enable_sleep_mode: true\nenable_cumem_allocator: false\n", machine=GPU),
        {
            "Remove enable_cumem_allocator": Setup("enable_sleep_mode: true\n", machine=GPU),
            "switch enable_sleep_mode off": Setup("enable_cumem_allocator: false\n", machine=GPU),
        },
    ),
    Case(
        "PD202",
        Setup(flags=("--enable-cumem-allocator",)),
        {
            "Remove enable_cumem_allocator": Setup(),
            "run on a CUDA device": Setup(flags=("--enable-cumem-allocator",), machine=GPU),
        },
    ),
    Case(
        "PD202",
        Setup(flags=("--device", "cpu", "--enable-cumem-allocator"), machine=GPU),
        {
            "Remove enable_cumem_allocator": Setup(flags=("--device", "cpu"), machine=GPU),
            "run on a CUDA device": Setup(flags=("--enable-cumem-allocator",), machine=GPU),
        },
    ),
    Case(
        "PD215",
        Setup("decode: {enable_cumem_allocator: true}\n", machine=OLD_DRIVER),
        {
            "Switch enable_cumem_allocator": Setup(machine=OLD_DRIVER),
            "update the CUDA driver": Setup(
                "decode: {enable_cumem_allocator: true}\n", machine=GPU
            ),
        },
    ),
    Case(
        "PD215",
        Setup(flags=("--enable-sleep-mode",), machine=OLD_DRIVER),
        {"enable_sleep_mode off": Setup(machine=OLD_DRIVER)},
    ),
    Case(
        "PD203",
        Setup(flags=("--enable-sleep-mode",)),
        {
            "Switch enable_sleep_mode off": Setup(),
            "run on a CUDA device": Setup(flags=("--enable-sleep-mode",), machine=GPU),
        },
    ),
    Case(
        "PD203",
        Setup(flags=("--device", "cpu", "--enable-sleep-mode"), machine=GPU),
        {"Switch enable_sleep_mode off": Setup(flags=("--device", "cpu"), machine=GPU)},
    ),
    Case(
        "PD207",
        Setup("max_num_batched_tokens: 4096\n", model="llama-8b", machine=SMALL_GPUS),
        {
            "Use more ranks": Setup(
                "max_num_batched_tokens: 4096\n",
                model="llama-8b",
                flags=("--prefill-tp", "4", "--decode-tp", "4"),
                machine=SMALL_GPUS,
            )
        },
    ),
    Case(
        "PD207",
        Setup(
            "dtype: float32\nmax_num_batched_tokens: 1024\n", model="llama-8b", machine=GPUS_OF_24
        ),
        {
            "a smaller dtype": Setup(
                "dtype: bfloat16\nmax_num_batched_tokens: 1024\n",
                model="llama-8b",
                machine=GPUS_OF_24,
            )
        },
    ),
    Case(
        "PD207",
        Setup(model="llama-8b", machine=GPUS_OF_24),
        {
            "a smaller max_num_batched_tokens": Setup(
                "max_num_batched_tokens: 2048\n", model="llama-8b", machine=GPUS_OF_24
            )
        },
    ),
    Case(
        "PD207",
        Setup("kv_cache_memory: 10GiB\n", model="llama-8b", machine=GPUS_OF_24),
        {
            "or kv_cache_memory": Setup(
                "kv_cache_memory: 6GiB\n", model="llama-8b", machine=GPUS_OF_24
            )
        },
    ),
    Case(
        "PD207",
        Setup(
            "gpu_memory_utilization: 0.6\nmax_num_batched_tokens: 1024\n",
            model="llama-8b",
            machine=GPUS_OF_24,
        ),
        {
            "a larger gpu_memory_utilization": Setup(
                "max_num_batched_tokens: 1024\n", model="llama-8b", machine=GPUS_OF_24
            )
        },
    ),
    Case(
        "PD207",
        Setup("max_num_batched_tokens: 1024\n", model="llama-128k", machine=GPUS_OF_24),
        {
            "max_model_len": Setup(
                "max_num_batched_tokens: 1024\nmax_model_len: 8192\n",
                model="llama-128k",
                machine=GPUS_OF_24,
            )
        },
    ),
    Case(
        "PD207",
        Setup(model="llama-8b", machine=HELD_GPUS),
        {"stop the processes that hold the GPU's memory": Setup(model="llama-8b", machine=GPU)},
    ),
    Case(
        "PD208",
        Setup("kv_cache_memory: 128KiB\nmax_model_len: 512\n"),
        {
            "Raise kv_cache_memory": Setup("kv_cache_memory: 256KiB\nmax_model_len: 512\n"),
            "lower max_model_len": Setup("kv_cache_memory: 128KiB\nmax_model_len: 256\n"),
        },
    ),
    Case(
        "PD208",
        Setup("kv_cache_memory: 16KiB\n"),
        {
            "Raise kv_cache_memory": Setup("kv_cache_memory: 1MiB\n"),
            "lower max_model_len": Setup("kv_cache_memory: 16KiB\nmax_model_len: 32\n"),
        },
    ),
    Case(
        "PD208",
        Setup("decode: {kv_cache_memory: 8KiB}\n"),
        {"Raise kv_cache_memory": Setup("decode: {kv_cache_memory: 1MiB}\n")},
    ),
    Case(
        "PD214",
        Setup("kv_cache_memory: 16KiB\nmax_model_len: 32\n"),
        {
            "Raise kv_cache_memory": Setup("kv_cache_memory: 512KiB\nmax_model_len: 32\n"),
            "lower max_num_seqs": Setup(
                "kv_cache_memory: 16KiB\nmax_model_len: 32\nmax_num_seqs: 2\n"
            ),
        },
    ),
    Case(
        "PD209",
        Setup("kv_cache_memory: 128KiB\n"),
        {
            "Set max_model_len to what fits": Setup(
                "kv_cache_memory: 128KiB\nmax_model_len: 256\n"
            ),
            "raise kv_cache_memory": Setup("kv_cache_memory: 256KiB\n"),
        },
    ),
    Case(
        "PD210",
        Setup(machine=ONE_GPU),
        {
            "Lower gpu_memory_utilization": Setup(
                "gpu_memory_utilization: 0.45\n", machine=ONE_GPU
            ),
            "set kv_cache_memory": Setup("kv_cache_memory: 1GiB\n", machine=ONE_GPU),
        },
    ),
    Case(
        "PD210",
        Setup(flags=("--decode", "2"), machine=TWO_GPUS),
        {"use fewer engines": Setup(machine=TWO_GPUS)},
    ),
    Case(
        "PD210",
        Setup("gpu_memory_utilization: 0.45\n", machine=HELD_GPU),
        {
            "Lower gpu_memory_utilization": Setup(
                "gpu_memory_utilization: 0.3\n", machine=HELD_GPU
            ),
            "stop other processes": Setup("gpu_memory_utilization: 0.45\n", machine=ONE_GPU),
        },
    ),
    Case(
        "PD211",
        Setup("gpu_memory_utilization: 0.4\n", machine=ONE_GPU),
        {"Use as many GPUs as there are ranks": Setup(machine=GPU)},
    ),
    Case(
        "PD211",
        Setup("gpu_memory_utilization: 0.4\n", flags=("--decode", "2"), machine=TWO_GPUS),
        {"fewer engines": Setup(machine=TWO_GPUS)},
    ),
    Case(
        "PD212",
        Setup("kv_cache_memory: 40GiB\n"),
        {
            "Lower kv_cache_memory": Setup("kv_cache_memory: 20GiB\n"),
        },
    ),
    Case(
        "PD212",
        Setup("kv_cache_memory: 20GiB\n", flags=("--decode", "3")),
        {"or the number of engines": Setup("kv_cache_memory: 20GiB\n")},
    ),
    Case(
        "PD212",
        Setup(model="llama-8b", machine=replace(CPU, memory_bytes=24 * GIB)),
        {"use a smaller model": Setup(machine=replace(CPU, memory_bytes=24 * GIB))},
    ),
    Case(
        "PD213",
        Setup(ON_NIXL, flags=("--enable-cumem-allocator",), machine=GPU),
        {
            "Let kv_transfer.nixl.path be auto": Setup(
                flags=("--enable-cumem-allocator",), machine=GPU
            ),
            "or p2p": Setup(
                "kv_transfer: {nixl: {path: p2p}}\n",
                flags=("--enable-cumem-allocator",),
                machine=GPU,
            ),
            "switch the CuMem allocator off": Setup(ON_NIXL, machine=GPU),
            "give the host an IMEX channel": Setup(
                ON_NIXL, flags=("--enable-cumem-allocator",), machine=GB200
            ),
        },
    ),
    Case(
        "PD220",
        Setup(f"{TIER}enable_prefix_caching: false\n"),
        {
            "Switch enable_prefix_caching on": Setup(TIER),
            "remove kv_offload": Setup("enable_prefix_caching: false\n"),
        },
    ),
    Case(
        "PD221",
        Setup("kv_offload: {host_memory: 40GiB}\n"),
        {"Lower kv_offload.host_memory": Setup(TIER)},
    ),
    Case(
        "PD222",
        Setup(TIER, machine=LOW_MEMLOCK),
        {
            "Raise the limit": Setup(TIER, machine=GPU),
            "lower kv_offload.host_memory": Setup(
                "kv_offload: {host_memory: 8MiB}\n", machine=LOW_MEMLOCK
            ),
        },
    ),
    Case(
        "PD223",
        Setup("kv_offload: {host_memory: 1GiB}\n"),
        {
            "several times the size of the KV cache": Setup(TIER),
            "remove kv_offload": Setup(),
        },
    ),
    Case(
        "PD224",
        Setup("kv_offload: {host_memory: 4KiB}\n"),
        {
            "Raise kv_offload.host_memory": Setup(TIER),
            "choose a smaller block_size": Setup(
                "kv_offload: {host_memory: 4KiB}\nblock_size: 4\n"
            ),
        },
    ),
    Case(
        "PD225",
        Setup("kv_offload: {policy: lru}\n"),
        {
            "Set kv_offload.host_memory": Setup("kv_offload: {policy: lru, host_memory: 8GiB}\n"),
            "remove kv_offload.policy": Setup(),
        },
    ),
]
