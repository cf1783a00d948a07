"""For each rule on machines and transport (PD4xx, PD5xx): where it fires, and near misses."""

from dataclasses import replace

from tests.checks.contexts import CPU, GPU, PAIR, ROUTER, Case, lacks, mooncake, on, show

HIDDEN_GPUS = replace(CPU, has_hidden_gpus=True)


STOCK = {"engine": "vllm", "kv_transfer__connector": "vllm-nixl"}
EMULATED = replace(PAIR, path="nixl/vLLM (tcp, software emulation)", gigabytes_per_s=None)

CASES: dict[str, Case] = {
    "PD460": Case(
        on(GPU, enable_cumem_allocator=True, probes=lacks("cuda")),
        mooncake(CPU, probes=lacks("mooncake")),
        quiet=[on(GPU, probes=lacks("gguf", "mooncake"))],
    ),
    "PD409": Case(mooncake(CPU), quiet=[on(CPU)]),
    "PD410": Case(
        on(CPU, device="cuda"),
        on(GPU, device="cuda", decode__env=show("-1")),
        quiet=[on(CPU), on(GPU, device="cuda"), on(GPU, decode__env=show("-1"))],
    ),
    "PD411": Case(
        on(GPU, decode__tensor_parallel_size=16),
        on(GPU, decode__tensor_parallel_size=2, decode__env=show("3")),
        quiet=[on(GPU, decode__tensor_parallel_size=8)],
    ),
    "PD450": Case(
        on(GPU, decode__env=show("8")),
        on(GPU, env=show("0,0")),
        on(GPU, environ=show("8,9,10,11,12,13,14,15"), decode__env=show("0")),
        quiet=[
            on(GPU, prefill__env=show("0"), decode__env=show("1")),
            on(GPU, environ=show("0,0")),
            on(GPU, decode__env=show("")),
        ],
    ),
    "PD451": Case(
        on(HIDDEN_GPUS),
        on(HIDDEN_GPUS, decode__device="cpu"),
        quiet=[on(CPU), on(HIDDEN_GPUS, device="cpu"), on(HIDDEN_GPUS, environ=show(""))],
    ),
    "PD412": Case(on(replace(CPU, num_cpus=1)), quiet=[on(replace(CPU, num_cpus=2))]),
    "PD416": Case(
        on(replace(CPU, shm_free_bytes=64 << 20)), quiet=[on(replace(CPU, shm_free_bytes=1 << 30))]
    ),
    "PD420": Case(
        on(CPU, probes={"ports": {ROUTER: "it is busy"}}),
        on(CPU, port=80, probes={"ports": {("127.0.0.1", 80): "it needs privileges"}}),
        quiet=[on(CPU, probes={"ports": {ROUTER: ""}})],
    ),
    "PD425": Case(
        on(CPU, prefill__tensor_parallel_size=3),
        quiet=[on(CPU), on(GPU, prefill__tensor_parallel_size=2)],
    ),
    "PD504": Case(
        on(GPU, pairs=(replace(PAIR, gigabytes_per_s=9.0),)),
        on(GPU, pairs=(replace(PAIR, gigabytes_per_s=9.0, path="mooncake/tcp"),)),
        on(CPU, pairs=(replace(PAIR, allocator="host", gigabytes_per_s=0.05),)),
        on(CPU, pairs=(replace(PAIR, hosts=("a", "b"), gigabytes_per_s=0.1),)),
        on(GPU, pairs=(EMULATED,), **STOCK),
        on(GPU, pairs=(replace(EMULATED, path="nixl/UCX (tcp, software emulation)"),)),
        quiet=[
            on(GPU, pairs=(replace(PAIR, gigabytes_per_s=20.0),)),
            on(GPU, pairs=(replace(PAIR, gigabytes_per_s=None),)),
            on(GPU, pairs=(replace(PAIR, path="file/safetensors", gigabytes_per_s=0.6),)),
            on(GPU, pairs=(replace(PAIR, path="nixl/vLLM (cuda_ipc)", gigabytes_per_s=0.6),)),
            on(CPU, pairs=(replace(EMULATED, allocator="host"),)),
            on(CPU, pairs=(replace(EMULATED, hosts=("a", "b")),)),
            on(CPU, pairs=(replace(PAIR, allocator="host", gigabytes_per_s=0.3),)),
            on(CPU, pairs=(replace(PAIR, hosts=("a", "b"), gigabytes_per_s=5.0),)),
        ],
    ),
}
