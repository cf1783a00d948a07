"""Rules PD401 to PD408, PD426, PD427, PD437, PD438 and PD460 judge packages and drivers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.memory_rules import cumem_setting
from pdlaunch.checks.rule import Found, rule
from pdlaunch.machine.allocator_conf import HIP_VARIABLE
from pdlaunch.machine.facts import Libraries

OLDEST_MOONCAKE = (0, 3, 13)


@rule(
    "PD401",
    "error",
    fix="pip install pdlaunch, without --no-deps.",
    source="The dependencies of pdlaunch.",
    needs=("libraries",),
)
def packages_missing(context: Context) -> Iterator[Found]:
    """torch or transformers is not installed.

    The ranks compute with them.
    """
    for name, version in (
        ("torch", context.machine.libraries.torch),
        ("transformers", context.machine.libraries.transformers),
    ):
        if version is None:
            yield Found(f"package {name}", f"{name} is not installed for this Python")


@rule(
    "PD402",
    "error",
    fix="pip install nixl",
    source="The dependencies of the nixl connector.",
    needs=("libraries",),
)
def nixl_missing(context: Context) -> Iterator[Found]:
    """NIXL is not installed.

    The nixl connector moves every KV block with it.
    """
    nixl = context.machine.libraries.nixl
    if not context.uses_ucx:
        return
    if nixl.version is None:
        yield Found("package nixl", "nixl is not installed for this Python")
    elif not nixl.backends:
        yield Found(
            "package nixl",
            f"nixl {nixl.version} has no build beside it",
            "pip install nixl-cu12, or nixl-cu13",
        )


@rule(
    "PD403",
    "error",
    fix="Install nixl again, or correct NIXL_PLUGIN_DIR.",
    source="NIXL 1.5.1: libplugin_UCX.so.",
    needs=("libraries",),
)
def ucx_plugin_missing(context: Context) -> Iterator[Found]:
    """The UCX plugin of NIXL is not there.

    NIXL loads its backends from plugin files beside it, or from NIXL_PLUGIN_DIR. Without UCX no
    agent can be made.
    """
    build = _nixl_build(context.machine.libraries)
    if (
        context.uses_ucx
        and build is not None
        and build not in context.machine.libraries.nixl.backends_with_ucx
    ):
        yield Found(f"package nixl-{build}", f"libplugin_UCX.so of nixl-{build} is not found")


@rule(
    "PD404",
    "error",
    fix=(
        "Read the error; often a CUDA library of another generation stands first in "
        "LD_LIBRARY_PATH."
    ),
    source="The import, tried in a process of its own.",
    needs=("nixl",),
)
def import_fails(context: Context) -> Iterator[Found]:
    """NIXL cannot be imported.

    A shared library that it needs is missing or of another version; every rank would end with this
    error.
    """
    for answer in (context.probes.nixl or {}).values() if context.uses_ucx else ():
        if answer.import_error is not None:
            yield Found("package nixl", f"import of nixl fails: {answer.import_error}")


@rule(
    "PD437",
    "error",
    fix="Install the connector's package and what it needs, or name another connector.",
    source="The import, tried in a process of its own.",
    needs=("connector",),
)
def connector_import_fails(context: Context) -> Iterator[Found]:
    """The connector of another package cannot be imported.

    Its entry point in the group `pdlaunch.connectors` names a spec, and the spec names what the
    ranks import. Every rank would end with this error.
    """
    for error in (context.probes.connector_errors or {}).values():
        yield Found("kv_transfer.connector", error)


@rule(
    "PD438",
    "error",
    fix="Name another connector, or use GPUs.",
    source="The connector's spec (`needs_cuda`).",
)
def connector_needs_cuda(context: Context) -> Iterator[Found]:
    """The connector moves device memory only, and an engine computes on the CPU.

    Its ranks could not register their KV cache.
    """
    transfer = context.config.kv_transfer
    for engines in context.peers("cpu"):
        if transfer.needs_cuda:
            yield Found(
                "kv_transfer.connector",
                f"connector {transfer.carrier} needs GPUs; {engines.role} is on the CPU",
            )


@rule(
    "PD405",
    "error",
    fix="Install the nixl build of torch's CUDA generation.",
    source="nixl 1.5.1: the meta package asks torch for its CUDA version.",
    needs=("libraries",),
)
def cuda_generations_mixed(context: Context) -> Iterator[Found]:
    """torch and NIXL are built for different CUDA generations.

    NIXL loads the build for torch's CUDA generation; with another one, two CUDA runtimes of
    different generations meet in one process, and the import fails or copies end in errors.
    """
    libraries = context.machine.libraries
    if libraries.torch_cuda is None or not libraries.nixl.backends or not context.uses_ucx:
        return
    wanted = f"cu{libraries.torch_cuda.partition('.')[0]}"
    if wanted not in libraries.nixl.backends:
        there = ", ".join(f"nixl-{name}" for name in sorted(libraries.nixl.backends))
        message = (
            f"torch {libraries.torch} is built for CUDA {libraries.torch_cuda}, NIXL is there as "
            f"{there}"
        )
        yield Found("package nixl", message, f"pip install nixl-{wanted}")


@rule(
    "PD406",
    "error",
    fix="Install a CUDA build of torch, or set device: cpu.",
    source="torch/version.py.",
    needs=("libraries", "gpus"),
)
def torch_without_cuda(context: Context) -> Iterator[Found]:
    """torch is built without CUDA, and engines are to run on GPUs.

    A CPU build of torch does not see any GPU.
    """
    libraries = context.machine.libraries
    for engine in context.on("cuda"):
        if libraries.torch is not None and libraries.torch_cuda is None and context.machine.gpus:
            yield Found(engine.where("device"), f"torch {libraries.torch} is built without CUDA")


@rule(
    "PD426",
    "error",
    fix="Install a build of torch for CUDA, or one for the CPU.",
    source="torch/version.py; pdlaunch is made for CUDA and for CPUs.",
    needs=("libraries",),
)
def torch_for_rocm(context: Context) -> Iterator[Found]:
    """torch is built for AMD GPUs (ROCm, HIP), which pdlaunch does not support.

    pdlaunch asks the CUDA driver for GPUs, shares memory through it, and its kernels and its
    transfers were made for it. Nothing of that has been tried with HIP.
    """
    libraries = context.machine.libraries
    if libraries.torch_is_for_rocm:
        yield Found("package torch", f"torch {libraries.torch} is built for ROCm")


@rule(
    "PD427",
    "warning",
    fix=f"Unset {HIP_VARIABLE}; PYTORCH_ALLOC_CONF is read on CUDA.",
    source="Compared with torch 2.13.0 (libc10, libc10_cuda).",
)
def hip_variable(context: Context) -> Iterator[Found]:
    """PYTORCH_HIP_ALLOC_CONF is set: AMD GPUs (ROCm, HIP) are not supported.

    A build of torch for CUDA takes most keys from this variable all the same, and then ignores
    them in PYTORCH_ALLOC_CONF.
    """
    for engine in context.engines.values():
        if HIP_VARIABLE in engine.given_environ:
            message = f"{HIP_VARIABLE} configures torch on AMD GPUs, which are not supported"
            yield Found(context.where_variable(engine, HIP_VARIABLE), message)


@rule(
    "PD407",
    "error",
    fix="Update the driver, or install a torch build for an older CUDA.",
    source="CUDA compatibility: minor versions of one generation fit, later generations do not.",
    needs=("libraries", "gpus", "driver"),
)
def driver_too_old(context: Context) -> Iterator[Found]:
    """The CUDA driver is too old for torch.

    A driver runs programs of its own CUDA generation and older ones.
    """
    driver, built = context.machine.driver_cuda, context.machine.libraries.torch_cuda
    if driver is None or built is None or not any(True for _ in context.on("cuda")):
        return
    if int(built.partition(".")[0]) > driver[0]:
        message = (
            f"torch is built for CUDA {built}, the driver runs up to CUDA {driver[0]}.{driver[1]}"
        )
        yield Found("CUDA driver", message)


@rule(
    "PD408",
    "error",
    fix="On Debian and Ubuntu: apt-get install libibverbs1",
    source=(
        "mooncake-transfer-engine: works over tcp on a CPU once libibverbs1 is there (measured)."
    ),
    needs=("libraries",),
)
def mooncake_libraries(context: Context) -> Iterator[Found]:
    """A library that Mooncake needs is missing.

    The transfer engine is linked against it, whatever protocol is used: its import fails.
    """
    libraries = context.machine.libraries
    if not context.uses("mooncake"):
        return
    if not libraries.mooncake:
        yield Found(
            "package mooncake",
            "mooncake is not installed for this Python",
            "pip install mooncake-transfer-engine",
        )
    elif (
        libraries.mooncake_version is not None
        and _numbers(libraries.mooncake_version) < OLDEST_MOONCAKE
    ):
        oldest = ".".join(map(str, OLDEST_MOONCAKE))
        yield Found(
            "package mooncake",
            (
                f"mooncake is {libraries.mooncake_version}; {oldest} is the oldest whose writes "
                "over TCP are acknowledged"
            ),
            f"pip install 'mooncake-transfer-engine>={oldest}'",
        )
    for name in libraries.missing_for_mooncake:
        yield Found("package mooncake", f"the loader does not find {name}")


@rule(
    "PD460",
    "error",
    fix="Install the extra for this Python, or leave out what asks for it.",
    source="pyproject.toml: optional-dependencies.",
    needs=("extras",),
)
def extra_missing(context: Context) -> Iterator[Found]:
    """A setting or the model asks for an extra of pdlaunch that is not installed.

    Spans are sent with the libraries of `otel`, a .gguf file is converted with those of `gguf`, and
    the CuMem allocator calls the driver through `cuda`. What needs them would end at its start.
    """
    missing, config = context.probes.missing_extras or {}, context.config
    wanted: list[tuple[str, str]] = []
    if config.tracing.otlp_endpoint is not None:
        wanted.append(("otel", "tracing.otlp_endpoint"))
    if context.launch.conversions:
        wanted.append(("gguf", "model"))
    # Of other hosts it is not known here.
    if not context.launch.spans_hosts:
        cumem = [engines for engines in context.on("cuda") if engines.allocator == "cumem"]
        wanted += [("cuda", engines.where(cumem_setting(engines))) for engines in cumem]
    for extra, where in wanted:
        if extra in missing:
            message = f"it needs the extra {extra}: there is no module {missing[extra]}"
            yield Found(where, message, f"pip install 'pdlaunch[{extra}]', or leave it out")


def _numbers(version: str) -> tuple[int, ...]:
    """Return ``0.3.13.post1`` as (0, 3, 13)."""
    parts = itertools.takewhile(str.isdecimal, version.split("."))
    return tuple(map(int, parts))


def _nixl_build(libraries: Libraries) -> str | None:
    """Return the build that ``import nixl`` will take."""
    if libraries.torch_cuda is not None:
        wanted = f"cu{libraries.torch_cuda.partition('.')[0]}"
        return wanted if wanted in libraries.nixl.backends else None
    return next(
        (name for name in ("cu13", "cu12", "rocm") if name in libraries.nixl.backends), None
    )
