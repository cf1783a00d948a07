"""For each rule on UCX (PD43x): variables that fire it, and its fixes."""

from pdlaunch.machine.facts import Machine
from tests.checks.contexts import CPU, GB200, GPU
from tests.checks.fires_libraries import nixl_as_installed
from tests.checks.firing import Case, Setup
from tests.checks.machines import NO_FABRIC, NO_IMEX


def with_ucx(machine: Machine = GPU, **variables: str) -> Setup:
    return Setup("kv_transfer: {nixl: {path: nixl}}\n", environ=variables, machine=machine)


def tried(**variables: str) -> Setup:
    return Setup(environ=variables, machine=None, arrange=nixl_as_installed)


TRIALS = [
    Case(
        "PD440",
        tried(UCX_RNDV_THRESH="bogus"),
        {"Correct the variable that the finding names": tried(UCX_RNDV_THRESH="8k")},
    ),
    Case(
        "PD444",
        tried(UCX_SHM_DEVICES="memory,foo"),
        {"UCX_..._DEVICES": tried(UCX_SHM_DEVICES="memory")},
    ),
]
"""Cases in which NIXL's backend is made in a process of its own."""

CASES = [
    Case(
        "PD441",
        with_ucx(CPU, UCX_TLS="sm,tpc"),
        {
            "Correct the name": with_ucx(CPU, UCX_TLS="sm,tcp"),
            "remove it from UCX_TLS": with_ucx(CPU, UCX_TLS="sm"),
        },
    ),
    Case(
        "PD442",
        with_ucx(CPU, UCX_NET_DEVICE="eth0"),
        {
            "Correct the name": with_ucx(CPU, UCX_NET_DEVICES="eth0"),
            "unset the variable": with_ucx(CPU),
        },
    ),
    Case("PD443", with_ucx(CPU, UCX_NET_DEVICES="eth99"), {"unset them": with_ucx(CPU)}),
    Case(
        "PD430",
        with_ucx(UCX_TLS="rc,sm,tcp"),
        {
            "Add cuda to UCX_TLS": with_ucx(UCX_TLS="rc,sm,tcp,cuda"),
            "unset it": with_ucx(),
        },
    ),
    Case(
        "PD431",
        with_ucx(UCX_TLS="sm,cuda_copy"),
        {
            "Add cuda to UCX_TLS": with_ucx(UCX_TLS="sm,cuda_copy,cuda"),
            "unset it": with_ucx(),
        },
    ),
    Case(
        "PD432",
        with_ucx(CPU, UCX_TLS="posix"),
        {"Add cma to UCX_TLS": with_ucx(CPU, UCX_TLS="posix,cma"), "unset it": with_ucx(CPU)},
    ),
    Case("PD433", with_ucx(CPU, UCX_TLS="tcp"), {"Unset UCX_TLS": with_ucx(CPU)}),
    Case(
        "PD433",
        with_ucx(CPU, UCX_SHM_DEVICES="foo"),
        {
            "or UCX_SHM_DEVICES": with_ucx(CPU),
        },
    ),
    Case(
        "PD435",
        with_ucx(GB200, UCX_CUDA_IPC_ENABLE_MNNVL="n"),
        {
            "Unset UCX_CUDA_IPC_ENABLE_MNNVL": with_ucx(GB200),
            "set it to y": with_ucx(GB200, UCX_CUDA_IPC_ENABLE_MNNVL="y"),
        },
    ),
    Case("PD445", with_ucx(NO_IMEX), {"start nvidia-imex on every host": with_ucx(GB200)}),
    Case(
        "PD448",
        with_ucx(GB200, UCX_CUDA_IPC_ENABLE_MNNVL="y"),
        {
            "--enable-cumem-allocator": Setup(
                flags=("--enable-cumem-allocator",),
                environ={"UCX_CUDA_IPC_ENABLE_MNNVL": "y"},
                machine=GB200,
            ),
            "unset UCX_CUDA_IPC_ENABLE_MNNVL": with_ucx(GB200),
        },
    ),
    Case("PD449", with_ucx(NO_FABRIC), {"Update the CUDA driver": with_ucx(GB200)}),
    Case(
        "PD436",
        with_ucx(UCX_CUDA_IPC_ENABLE_MNNVL="y"),
        {
            "Unset UCX_CUDA_IPC_ENABLE_MNNVL": with_ucx(),
            "start the IMEX service": with_ucx(GB200, UCX_CUDA_IPC_ENABLE_MNNVL="y"),
        },
    ),
]
