"""For each rule on the machine (PD400, PD41x): a machine that fires it, and its fixes."""

from dataclasses import replace

from pdlaunch.machine.facts import SharedMemory
from tests.checks.contexts import CPU, GIB, GPU
from tests.checks.firing import Case, Setup
from tests.checks.machines import MOONCAKE, ON_MOONCAKE, libraries, limits

RDMA = replace(MOONCAKE, rdma_devices=("mlx5_0",))
ON_RDMA = "kv_transfer: {connector: mooncake, mooncake: {protocol: rdma}}\n"
ON_NVLINK = "kv_transfer: {connector: mooncake, mooncake: {protocol: nvlink}}\n"

CASES = [
    Case(
        "PD451",
        Setup(machine=replace(CPU, has_hidden_gpus=True), measured=()),
        {
            "give the container the GPUs": Setup(machine=GPU, measured=()),
            "set device: cpu": Setup(
                "device: cpu\n", machine=replace(CPU, has_hidden_gpus=True), measured=()
            ),
        },
    ),
    Case("PD400", Setup(machine=replace(CPU, system="Darwin")), {"Run serve on Linux": Setup()}),
    Case(
        "PD410",
        Setup(flags=("--device", "cuda")),
        {
            "Set device: cpu": Setup(flags=("--device", "cpu")),
            "check nvidia-smi": Setup(flags=("--device", "cuda"), machine=GPU),
        },
    ),
    Case(
        "PD411",
        Setup(flags=("--decode-tp", "4"), machine=replace(GPU, gpus=GPU.gpus[:2])),
        {
            "Lower tensor_parallel_size": Setup(
                flags=("--decode-tp", "1"), machine=replace(GPU, gpus=GPU.gpus[:2])
            )
        },
    ),
    Case(
        "PD450",
        Setup("decode: {env: {CUDA_VISIBLE_DEVICES: '0,0'}}\n", machine=GPU),
        {
            "Name GPUs that the launch itself sees": Setup(
                "prefill: {env: {CUDA_VISIBLE_DEVICES: '0'}}\n"
                "decode: {env: {CUDA_VISIBLE_DEVICES: '1'}}\n",
                machine=GPU,
            ),
            "leave CUDA_VISIBLE_DEVICES out": Setup(machine=GPU),
        },
    ),
    Case(
        "PD412",
        Setup(flags=("--decode", "2"), machine=replace(CPU, cpus=(0, 1))),
        {
            "Use fewer engines": Setup(machine=replace(CPU, cpus=(0, 1))),
            "or more cores": Setup(flags=("--decode", "2"), machine=replace(CPU, cpus=(0, 1, 2))),
        },
    ),
    Case(
        "PD413",
        Setup(flags=("--dtype", "bfloat16"), machine=replace(CPU, has_native_bf16=False)),
        {
            "Set dtype: auto": Setup(machine=replace(CPU, has_native_bf16=False)),
            "or float32": Setup("dtype: float32\n", machine=replace(CPU, has_native_bf16=False)),
        },
    ),
    Case(
        "PD414",
        Setup(ON_RDMA, machine=limits(RDMA, memlock_bytes=8 << 20)),
        {"ulimit -l unlimited": Setup(ON_RDMA, machine=RDMA)},
    ),
    Case(
        "PD446",
        Setup(ON_RDMA, machine=MOONCAKE),
        {
            "Set kv_transfer.mooncake.protocol: tcp": Setup(flags=ON_MOONCAKE, machine=MOONCAKE),
            "use connector nixl": Setup(),
        },
    ),
    Case(
        "PD447",
        Setup(ON_NVLINK, machine=MOONCAKE),
        {
            "Set kv_transfer.mooncake.protocol: tcp": Setup(flags=ON_MOONCAKE, machine=MOONCAKE),
            "run both sides on GPUs": Setup(
                ON_NVLINK,
                machine=libraries(GPU, mooncake=True, mooncake_version="0.3.13.post1"),
            ),
        },
    ),
    Case(
        "PD415",
        Setup(machine=limits(num_open_files=1024)),
        {"ulimit -n 65536": Setup(machine=limits(num_open_files=65536))},
    ),
    Case(
        "PD416",
        Setup(machine=replace(CPU, shm=SharedMemory(64 << 20, 64 << 20))),
        {"--shm-size=1g": Setup(machine=replace(CPU, shm=SharedMemory(GIB, GIB)))},
    ),
    Case(
        "PD417",
        Setup(machine=replace(CPU, shm=SharedMemory(GIB, GIB, ("ucx_shm_posix_1",)))),
        {"Remove them": Setup(machine=replace(CPU, shm=SharedMemory(GIB, GIB)))},
    ),
    Case(
        "PD419",
        Setup(flags=("--kv-connector", "file", "--kv-file-directory", "/proc/nope"), machine=None),
        {
            "Name a folder that the user of the launch may write to": Setup(
                flags=("--kv-connector", "file", "--kv-file-directory", "tiny"), machine=None
            ),
            "or may create": Setup(
                flags=("--kv-connector", "file", "--kv-file-directory", "new/folder"), machine=None
            ),
        },
    ),
]
