"""For each rule on libraries (PD40x, PD437, PD438, PD460): a machine that fires it; its fixes."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

from pdlaunch.cli import check_config as command
from pdlaunch.config import connectors
from pdlaunch.machine.facts import NixlInstall
from tests.checks.contexts import CPU, GPU
from tests.checks.firing import Case, Setup
from tests.checks.machines import MOONCAKE, ON_MOONCAKE, libraries

ON_OTLP = ("--otlp-endpoint", "http://127.0.0.1:4318")
CU12, CU13 = frozenset({"cu12"}), frozenset({"cu13"})
NEEDS_IBVERBS = libraries(MOONCAKE, missing_for_mooncake=("libibverbs.so.1",))


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


def whole_connector(
    needs_cuda: bool = False,
) -> contextlib.AbstractContextManager[tuple[str, ...]]:
    return connector_of_another_package(
        "from pdlaunch.config.connectors import ConnectorSpec\n"
        f"SPEC = ConnectorSpec()\nSPEC.needs_cuda = {needs_cuda}\n"
        "SPEC.factory = 'pdlaunch.transfer.connectors.file:new_connector'\n"
    )


@contextlib.contextmanager
def without_extra(name: str, *flags: str) -> Iterator[tuple[str, ...]]:
    """This Python finds none of the extra's modules; ``flags`` ask for it."""
    missing = {name: ("pdlaunch_lacks_this",)}
    with patch.dict("pdlaunch.checks.probes.EXTRAS", missing):
        yield flags


def cuda_connector() -> contextlib.AbstractContextManager[tuple[str, ...]]:
    return whole_connector(needs_cuda=True)


@contextlib.contextmanager
def nixl_of_another_cuda() -> Iterator[tuple[str, ...]]:
    """The first NIXL on the path needs a library that is not there."""
    with tempfile.TemporaryDirectory() as folder:
        text = "raise ImportError('libcudart.so.11.0: cannot open shared object file')\n"
        Path(folder, "nixl.py").write_text(text)
        path = os.pathsep.join((folder, os.environ.get("PYTHONPATH", "")))
        with patch.dict(os.environ, PYTHONPATH=path), nixl_as_installed() as flags:
            yield flags


@contextlib.contextmanager
def nixl_as_installed() -> Iterator[tuple[str, ...]]:
    """Libraries are imported, and nothing is started."""
    with patch.object(command, "probe_transport", lambda launch: ()):
        yield ("--probe",)


IMPORTS = [
    Case(
        "PD404",
        Setup(machine=None, arrange=nixl_of_another_cuda),
        {"stands first in LD_LIBRARY_PATH": Setup(machine=None, arrange=nixl_as_installed)},
    ),
]
"""Cases that start processes."""

CASES = [
    Case(
        "PD426",
        Setup(machine=libraries(CPU, torch="2.13.0+rocm6.4")),
        {
            "Install a build of torch for CUDA": Setup(machine=GPU),
            "or one for the CPU": Setup(),
        },
    ),
    Case(
        "PD427",
        Setup(environ={"PYTORCH_HIP_ALLOC_CONF": "garbage_collection_threshold:0.5"}, machine=GPU),
        {
            "Unset PYTORCH_HIP_ALLOC_CONF": Setup(machine=GPU),
            "PYTORCH_ALLOC_CONF is read on CUDA": Setup(
                environ={"PYTORCH_ALLOC_CONF": "garbage_collection_threshold:0.5"}, machine=GPU
            ),
        },
    ),
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
        "PD437",
        Setup(machine=None, arrange=broken_connector),
        {
            "Install the connector's package": Setup(machine=None, arrange=whole_connector),
            "name another connector": Setup(machine=None),
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
    Case(
        "PD460",
        Setup(machine=None, arrange=partial(without_extra, "otel", *ON_OTLP)),
        {
            "Install the extra": Setup(machine=None, flags=ON_OTLP),
            "leave out": Setup(machine=None, arrange=partial(without_extra, "otel")),
        },
    ),
    Case(
        "PD460",
        Setup(machine=None, model="tiny.gguf", arrange=partial(without_extra, "gguf")),
        {"leave out": Setup(machine=None, arrange=partial(without_extra, "gguf"))},
    ),
]
