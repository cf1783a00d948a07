"""For each rule on the environment (PD4xx): a set-up or machine that fires it, and its fixes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from pdlaunch.config import connectors
from pdlaunch.platform.facts import Machine, NixlInstall, SharedMemory
from tests.checks.contexts import CPU, GB200, GIB, GPU
from tests.checks.firing import Case, Setup, busy_port, free_port


def libraries(base: Machine, **changes: object) -> Machine:
    return replace(base, libraries=replace(base.libraries, **changes))


def limits(base: Machine = CPU, **changes: object) -> Machine:
    return replace(base, limits=replace(base.limits, **changes))


CU12, CU13 = frozenset({"cu12"}), frozenset({"cu13"})
MOONCAKE = libraries(CPU, mooncake=True, mooncake_version="0.3.13.post1")
NEEDS_IBVERBS = libraries(MOONCAKE, missing_for_mooncake=("libibverbs.so.1",))
RDMA = replace(MOONCAKE, rdma_devices=("mlx5_0",))
ON_RDMA = "kv_transfer: {connector: mooncake, mooncake: {protocol: rdma}}\n"
ON_MOONCAKE = ("--kv-connector", "mooncake")
ON_A_CPU = Setup("device: cpu\n", machine=GPU)


def with_ucx(machine: Machine = GPU, **variables: str) -> Setup:
    return Setup("kv_transfer: {nixl: {path: nixl}}\n", environ=variables, machine=machine)


@contextlib.contextmanager
def privileged_port() -> Iterator[tuple[str, ...]]:
    """The command has no privileges, and is to listen on a port that needs them."""
    first_free = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if not first_free:
        pytest.skip("this kernel lets everybody listen on every port")
    with without_capabilities():
        yield "--port", str(first_free - 1)


@contextlib.contextmanager
def without_capabilities() -> Iterator[None]:
    """This thread has no capabilities in effect, whoever runs it."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    before, without = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    without[:] = before
    without[0] = without[3] = 0  # effective: the low and the high 32 capabilities
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@contextlib.contextmanager
def connector_of_another_package(spec: str) -> Iterator[tuple[str, ...]]:
    """A package with connector ``theirs`` is installed, whose module holds ``spec``."""
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder, "theirs-1.0.dist-info")
        info.mkdir()
        info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        info.joinpath("entry_points.txt").write_text(
            "[pdlaunch.connectors]\ntheirs = theirs:SPEC\n"
        )
        Path(folder, "theirs.py").write_text(spec)
        sys.path.insert(0, folder)
        forget_connectors()
        try:
            yield ("--kv-connector", "theirs")
        finally:
            sys.path.remove(folder)
            sys.modules.pop("theirs", None)
            forget_connectors()


def forget_connectors() -> None:
    connectors._others.cache_clear()
    connectors.other_sections.cache_clear()


def broken_connector() -> contextlib.AbstractContextManager[tuple[str, ...]]:
    return connector_of_another_package("import no_such_module_of_theirs\n")


def cuda_connector() -> contextlib.AbstractContextManager[tuple[str, ...]]:
    return connector_of_another_package(
        "from pdlaunch.config.connectors import ConnectorSpec\n"
        "SPEC = ConnectorSpec()\nSPEC.needs_cuda = True\n"
        "SPEC.factory = 'pdlaunch.transfer.connectors.file:new_connector'\n"
    )


@contextlib.contextmanager
def nixl_of_another_cuda() -> Iterator[tuple[str, ...]]:
    """The first NIXL on the path needs a library that is not there."""
    with tempfile.TemporaryDirectory() as folder:
        text = "raise ImportError('libcudart.so.11.0: cannot open shared object file')\n"
        Path(folder, "nixl.py").write_text(text)
        with patch.dict(os.environ, PYTHONPATH=folder):
            yield NO_LAUNCH


@contextlib.contextmanager
def nixl_as_installed() -> Iterator[tuple[str, ...]]:
    yield NO_LAUNCH


NO_LAUNCH = ("--probe", "--assume-platform", "cpu")
"""Libraries are imported, and nothing is started."""
IMPORTS = [
    Case(
        "PD404",
        Setup(machine=None, arrange=nixl_of_another_cuda),
        {"stands first in LD_LIBRARY_PATH": Setup(machine=None, arrange=nixl_as_installed)},
    ),
]
"""Cases that start processes."""

CASES = [
    Case("PD400", Setup(machine=replace(CPU, system="Darwin")), {"Run serve on Linux": Setup()}),
    Case("PD401", Setup(machine=libraries(CPU, torch=None)), {"pip install pdlaunch": Setup()}),
    Case(
        "PD402",
        Setup(machine=libraries(CPU, nixl=NixlInstall())),
        {"pip install nixl": Setup()},
    ),
    Case(
        "PD403",
        Setup(machine=libraries(CPU, nixl=NixlInstall("1.5.1", {"cu12": "1.5.1"}, frozenset()))),
        {"Install nixl again": Setup()},
    ),
    Case(
        "PD405",
        Setup(machine=libraries(GPU, nixl=NixlInstall("1.5.1", {"cu12": "1.5.1"}, CU12))),
        {
            "Install the nixl build of torch's CUDA generation": Setup(
                machine=libraries(GPU, nixl=NixlInstall("1.5.1", {"cu13": "1.5.1"}, CU13))
            )
        },
    ),
    Case(
        "PD406",
        Setup(machine=libraries(GPU, torch="2.13.0+cpu", torch_cuda=None)),
        {
            "Install a CUDA build of torch": Setup(machine=GPU),
            "set device: cpu": Setup(
                "device: cpu\n", machine=libraries(GPU, torch="2.13.0+cpu", torch_cuda=None)
            ),
        },
    ),
    Case(
        "PD407",
        Setup(machine=replace(GPU, driver_cuda=(12, 8))),
        {
            "Update the driver": Setup(machine=GPU),
            "install a torch build for an older CUDA": Setup(
                machine=libraries(
                    replace(GPU, driver_cuda=(12, 8)), torch="2.13.0+cu126", torch_cuda="12.6"
                )
            ),
        },
    ),
    Case(
        "PD408",
        Setup(flags=ON_MOONCAKE, machine=NEEDS_IBVERBS),
        {"apt-get install libibverbs1": Setup(flags=ON_MOONCAKE, machine=MOONCAKE)},
    ),
    Case(
        "PD409",
        Setup(flags=ON_MOONCAKE, machine=MOONCAKE),
        {"Use connector nixl": Setup(machine=MOONCAKE)},
    ),
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
        "PD418",
        Setup(flags=ON_MOONCAKE, machine=limits(MOONCAKE, can_bind_to_device=False)),
        {
            "CAP_NET_RAW": Setup(flags=ON_MOONCAKE, machine=MOONCAKE),
            "use connector nixl": Setup(machine=limits(MOONCAKE, can_bind_to_device=False)),
        },
    ),
    Case(
        "PD419",
        Setup(flags=("--kv-connector", "file", "--kv-file-directory", "deploy.yaml"), machine=None),
        {
            "Name a folder that the user of the launch may write to": Setup(
                flags=("--kv-connector", "file", "--kv-file-directory", "tiny"), machine=None
            ),
            "or may create": Setup(
                flags=("--kv-connector", "file", "--kv-file-directory", "new/folder"), machine=None
            ),
        },
    ),
    Case(
        "PD420",
        Setup(machine=None, arrange=busy_port),
        {
            "Choose another port": Setup(machine=None, arrange=free_port),
            "stop that process": Setup(machine=None, arrange=free_port),
        },
    ),
    Case(
        "PD421",
        Setup(machine=None, arrange=privileged_port),
        {"Choose a port from 1024 on": Setup(machine=None, arrange=free_port)},
    ),
    Case(
        "PD422",
        Setup(flags=("--host", "192.0.2.1"), environ={"PDLAUNCH_API_KEY": "k"}, machine=None),
        {
            "Use 127.0.0.1": Setup(flags=("--host", "127.0.0.1"), machine=None),
            "0.0.0.0": Setup(flags=("--host", "0.0.0.0"), machine=None),
        },
    ),
    Case(
        "PD425",
        Setup(flags=("--decode-tp", "2")),
        {"Use one rank an engine": Setup(flags=("--decode-tp", "1"))},
    ),
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
        "PD435",
        with_ucx(GB200, UCX_CUDA_IPC_ENABLE_MNNVL="n"),
        {
            "Unset UCX_CUDA_IPC_ENABLE_MNNVL": with_ucx(GB200),
            "set it to y": with_ucx(GB200, UCX_CUDA_IPC_ENABLE_MNNVL="y"),
        },
    ),
    Case(
        "PD436",
        with_ucx(UCX_CUDA_IPC_ENABLE_MNNVL="y"),
        {
            "Unset UCX_CUDA_IPC_ENABLE_MNNVL": with_ucx(),
            "start the IMEX service": with_ucx(GB200, UCX_CUDA_IPC_ENABLE_MNNVL="y"),
        },
    ),
    Case(
        "PD437",
        Setup(machine=None, arrange=broken_connector),
        {
            "Install the connector's package": Setup(machine=GPU, arrange=cuda_connector),
            "name another connector": Setup(),
        },
    ),
    Case(
        "PD438",
        Setup(arrange=cuda_connector),
        {
            "Name another connector": Setup(),
            "use GPUs": Setup(machine=GPU, arrange=cuda_connector),
        },
    ),
]
