"""For each rule on machines and transport (PD4xx, PD5xx): where it fires, and near misses."""

from dataclasses import replace

from pdlaunch.machine.availability import PortState
from tests.checks.case import (
    PAIR,
    ROUTER,
    Case,
    lacks,
    libraries,
    machine,
    mooncake,
    nixl_says,
    p2p,
)
from tests.checks.contexts import CPU, GPU, on

HIDDEN_GPUS = replace(CPU, has_hidden_gpus=True)
NO_CUDA = "transports 'cuda_ipc','cuda_copy' are not available, please use one or more of: cma, sm"


CASES: dict[str, Case] = {
    "PD400": Case([on(machine(system="Darwin"))], [on(CPU)]),
    "PD401": Case([on(libraries(torch=None)), on(libraries(transformers=None))], [on(CPU)]),
    "PD402": Case(
        [on(libraries(nixl=None, nixl_backends={})), on(libraries(nixl_backends={}))],
        [on(CPU), p2p(libraries(nixl=None, nixl_backends={}))],
    ),
    "PD404": Case(
        [on(CPU, probes=nixl_says(import_error="undefined symbol"))],
        [
            on(CPU, probes=nixl_says(refusal="Invalid value")),
            p2p(CPU, probes=nixl_says(import_error="undefined symbol")),
        ],
    ),
    "PD437": Case(
        [on(CPU, probes={"connector_errors": {"theirs": "connector theirs cannot be imported"}})],
        [on(CPU, probes={"connector_errors": {}})],
    ),
    "PD460": Case(
        [
            on(CPU, tracing__otlp_endpoint="http://a:4318", probes=lacks("otel")),
            on(GPU, enable_cumem_allocator=True, probes=lacks("cuda")),
        ],
        [
            on(CPU, tracing__otlp_endpoint="http://a:4318", probes=lacks("cuda")),
            on(GPU, probes=lacks("otel", "gguf")),
        ],
    ),
    "PD405": Case(
        [on(libraries(GPU, nixl_backends={"cu12": "1"}))],
        [on(libraries(nixl_backends={"cu12": "1"})), on(GPU)],
    ),
    "PD406": Case([on(libraries(GPU, torch="2.13.0+cpu", torch_cuda=None))], [on(CPU), on(GPU)]),
    "PD407": Case(
        [on(machine(GPU, driver_cuda=(12, 8)))], [on(libraries(GPU, torch_cuda="12.8")), on(GPU)]
    ),
    "PD408": Case(
        [
            mooncake(CPU),
            mooncake(libraries(mooncake=True, missing_for_mooncake=("libibverbs.so.1",))),
        ],
        [
            mooncake(libraries(mooncake=True)),
            on(libraries(mooncake=True, missing_for_mooncake=("libibverbs.so.1",))),
        ],
    ),
    "PD409": Case([mooncake(CPU)], [on(CPU)]),
    "PD410": Case(
        [
            on(CPU, device="cuda"),
            on(GPU, device="cuda", decode__env={"CUDA_VISIBLE_DEVICES": "-1"}),
        ],
        [on(CPU), on(GPU, device="cuda"), on(GPU, decode__env={"CUDA_VISIBLE_DEVICES": "-1"})],
    ),
    "PD411": Case(
        [
            on(GPU, decode__tensor_parallel_size=16),
            on(GPU, decode__tensor_parallel_size=2, decode__env={"CUDA_VISIBLE_DEVICES": "3"}),
        ],
        [on(GPU, decode__tensor_parallel_size=8)],
    ),
    "PD450": Case(
        [
            on(GPU, decode__env={"CUDA_VISIBLE_DEVICES": "8"}),
            on(GPU, env={"CUDA_VISIBLE_DEVICES": "0,0"}),
            on(
                GPU,
                environ={"CUDA_VISIBLE_DEVICES": "8,9,10,11,12,13,14,15"},
                decode__env={"CUDA_VISIBLE_DEVICES": "0"},
            ),
        ],
        [
            on(
                GPU,
                prefill__env={"CUDA_VISIBLE_DEVICES": "0"},
                decode__env={"CUDA_VISIBLE_DEVICES": "1"},
            ),
            on(GPU, environ={"CUDA_VISIBLE_DEVICES": "0,0"}),
            on(GPU, decode__env={"CUDA_VISIBLE_DEVICES": ""}),
        ],
    ),
    "PD451": Case(
        [on(HIDDEN_GPUS), on(HIDDEN_GPUS, decode__device="cpu")],
        [
            on(CPU),
            on(HIDDEN_GPUS, device="cpu"),
            on(HIDDEN_GPUS, environ={"CUDA_VISIBLE_DEVICES": ""}),
        ],
    ),
    "PD412": Case([on(machine(num_cpus=1))], [on(machine(num_cpus=2))]),
    "PD413": Case(
        [on(machine(has_native_bf16=False), dtype="bfloat16"), on(CPU, dtype="float16")],
        [on(CPU, dtype="bfloat16"), on(machine(has_native_bf16=False))],
    ),
    "PD415": Case([on(machine(num_open_files=1024))], [on(machine(num_open_files=8192))]),
    "PD416": Case([on(machine(shm_free_bytes=64 << 20))], [on(machine(shm_free_bytes=1 << 30))]),
    "PD419": Case(
        [on(CPU, probes={"folder_problems": {"kv_transfer.file.directory": "/kv is no folder"}})],
        [on(CPU, probes={"folder_problems": {}})],
    ),
    "PD420": Case(
        [on(CPU, probes={"ports": {ROUTER: PortState("busy")}})],
        [on(CPU, probes={"ports": {ROUTER: PortState()}})],
    ),
    "PD421": Case(
        [on(CPU, port=80, probes={"ports": {("127.0.0.1", 80): PortState("privileged")}})],
        [on(CPU, probes={"ports": {ROUTER: PortState("busy")}})],
    ),
    "PD422": Case(
        [on(CPU, probes={"ports": {ROUTER: PortState("not here")}})],
        [on(CPU, probes={"ports": {ROUTER: PortState()}})],
    ),
    "PD425": Case(
        [on(CPU, prefill__tensor_parallel_size=3)],
        [on(CPU), on(GPU, prefill__tensor_parallel_size=2)],
    ),
    "PD432": Case(
        [on(CPU, environ={"UCX_TLS": "posix"})],
        [on(CPU, environ={"UCX_TLS": "tcp,sm"}), on(CPU), p2p(CPU, environ={"UCX_TLS": "posix"})],
    ),
    "PD433": Case(
        [on(CPU, environ={"UCX_TLS": "tcp"}), on(CPU, environ={"UCX_TLS": "\\sm"})],
        [on(CPU, environ={"UCX_TLS": "posix"}), p2p(CPU, environ={"UCX_TLS": "tcp"})],
    ),
    "PD440": Case(
        [on(CPU, probes=nixl_says(refusal="Invalid value for BW: 'foo'"))],
        [on(CPU, probes=nixl_says()), p2p(CPU, probes=nixl_says(refusal="Invalid value"))],
    ),
    "PD442": Case(
        [
            on(CPU, probes=nixl_says(warnings=("transport 'cma' is not available",))),
            on(GPU, probes=nixl_says(warnings=(NO_CUDA,))),
            on(CPU, probes=nixl_says(warnings=("unused variable: UCX_A (maybe: UCX_B?)",))),
        ],
        [
            # NIXL wants CUDA's transports to be named wherever there are GPUs.
            on(CPU, probes=nixl_says(warnings=(NO_CUDA,))),
            on(CPU, probes=nixl_says(warnings=("network device 'eth9' is not available",))),
        ],
    ),
    "PD501": Case(
        [on(CPU, pairs=(replace(PAIR, error="REMOTE_DISCONNECT"),))], [on(CPU, pairs=(PAIR,))]
    ),
    "PD503": Case(
        [
            on(GPU, pairs=(replace(PAIR, allocator=allocator, gigabytes_per_s=0.6),))
            for allocator in ("cumem", "expandable_segments")
        ],
        [
            on(GPU, pairs=(replace(PAIR, allocator="cumem", path="p2p"),)),
            on(GPU, pairs=(replace(PAIR, gigabytes_per_s=0.6),)),
            on(GPU, pairs=(replace(PAIR, gigabytes_per_s=None, error="gone"),)),
        ],
    ),
    "PD504": Case(
        [on(GPU, pairs=(replace(PAIR, gigabytes_per_s=12.0),))],
        [
            on(GPU, pairs=(replace(PAIR, gigabytes_per_s=300.0),)),
            on(GPU, pairs=(replace(PAIR, allocator="cumem", gigabytes_per_s=0.6),)),
            on(
                GPU,
                pairs=(
                    replace(PAIR, gigabytes_per_s=None),
                    replace(PAIR, expected_gigabytes_per_s=None),
                ),
            ),
        ],
    ),
    "PD506": Case(
        [on(CPU, pairs=(replace(PAIR, hosts=("a", "b"), gigabytes_per_s=0.1),))],
        [
            on(CPU, pairs=(replace(PAIR, gigabytes_per_s=0.1, expected_gigabytes_per_s=None),)),
            on(CPU, pairs=(replace(PAIR, hosts=("a", "b"), gigabytes_per_s=None),)),
            on(CPU, pairs=(replace(PAIR, hosts=("a", "b"), gigabytes_per_s=5.0),)),
        ],
    ),
    "PD505": Case(
        [on(CPU, pairs=(PAIR,))],
        [on(CPU, pairs=(replace(PAIR, gigabytes_per_s=None), replace(PAIR, error="gone")))],
    ),
}
