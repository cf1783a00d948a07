"""Rules on fabric handles and multi-node NVLink, as GB-series machines have them."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.machine.facts import Gpu

_MNNVL = "UCX_CUDA_IPC_ENABLE_MNNVL"
_FABRIC = (
    "CUDA driver API: cuMemExportToShareableHandle, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_"
    "SUPPORTED; NVIDIA's guide to IMEX."
)


@rule(
    "PD435",
    "warning",
    fix=f"Unset {_MNNVL} (UCX then tries), or set it to y.",
    source="UCX 1.19: yes, no or try; try is the default.",
    needs=("gpus", "fabric"),
)
def mnnvl_off_with_fabric(context: Context) -> Iterator[Found]:
    """Multi-node NVLink is switched off on a machine that has it.

    GB-series machines with an IMEX channel exchange memory over NVLink, also between hosts. With
    the switch off, UCX takes the network, or copies fabric-handle memory through the host.
    """
    has_fabric = any(gpu.is_grace and gpu.has_fabric_handles for gpu in context.machine.gpus)
    for engine in context.peers("cuda") if has_fabric else ():
        if context.uses_ucx and _is_off(engine.given_environ.get(_MNNVL)):
            yield Found(
                context.where_variable(engine, _MNNVL),
                f"{_MNNVL} is off on {context.machine.gpus[0].name} with fabric handles",
            )


@rule(
    "PD436",
    "warning",
    fix=f"Unset {_MNNVL}, or start the IMEX service and give this container its channel.",
    source=(
        "Measured on two H200s without an IMEX channel: no difference with "
        "UCX_CUDA_IPC_ENABLE_MNNVL=y."
    ),
    needs=("gpus", "fabric"),
)
def mnnvl_on_without_fabric(context: Context) -> Iterator[Found]:
    """Multi-node NVLink is demanded on a machine without fabric handles.

    Without an IMEX channel there are no fabric handles. With the switch on, UCX says nothing and
    moves CuMem memory at 0.6 GB/s.
    """
    gpus = context.machine.gpus
    if not gpus or any(gpu.has_fabric_handles is not False for gpu in gpus):
        return
    for engine in context.peers("cuda"):
        if context.uses_ucx and _is_on(engine.given_environ.get(_MNNVL)):
            yield Found(
                context.where_variable(engine, _MNNVL),
                f"{_MNNVL} is on, but {gpus[0].name} has no fabric handles here",
            )


@rule(
    "PD445",
    "info",
    fix=(
        "Nothing to fix on one host; else start nvidia-imex on every host and give the container "
        "its channel (/dev/nvidia-caps-imex-channels/channel0)."
    ),
    source=_FABRIC,
    needs=("gpus", "fabric"),
)
def grace_without_channel(context: Context) -> Iterator[Found]:
    """A GB-series machine has no IMEX channel.

    Without a channel the driver exports no fabric handles: CuMem pools are shared by POSIX file
    descriptors, within this host alone, and NVLink between hosts cannot be used. The service
    nvidia-imex runs on all hosts of the NVLink domain; its channel is a device file, which a
    container is given like a GPU.
    """
    gpu = _first_of_grace(context)
    if gpu is not None and not gpu.has_fabric_handles and gpu.supports_fabric is not False:
        message = f"{gpu.name} without an IMEX channel: no fabric handles"
        yield Found("IMEX channel", message)


@rule(
    "PD448",
    "warning",
    fix=f"Use --enable-cumem-allocator, or unset {_MNNVL}.",
    source=_FABRIC,
    needs=("gpus", "fabric"),
)
def mnnvl_without_cumem(context: Context) -> Iterator[Found]:
    """Multi-node NVLink is demanded for memory that has no fabric handle.

    Only CuMem pools are allocated so that the driver can export them as fabric handles. A KV cache
    of cudaMalloc or of expandable segments does not leave its host over NVLink, whatever the
    variable says.
    """
    if all(not gpu.has_fabric_handles for gpu in context.machine.gpus):
        return  # PD436
    for engine in context.peers("cuda"):
        is_demanded = _is_on(engine.given_environ.get(_MNNVL))
        if context.uses_ucx and is_demanded and engine.allocator != "cumem":
            yield Found(
                context.where_variable(engine, _MNNVL),
                f"{_MNNVL} is on, but the KV cache is {engine.allocator} memory",
            )


@rule(
    "PD449",
    "warning",
    fix="Update the CUDA driver and its Fabric Manager, and give the container all of the GPUs.",
    source=_FABRIC,
    needs=("gpus", "fabric"),
)
def channel_without_fabric(context: Context) -> Iterator[Found]:
    """A GB-series machine has an IMEX channel, and a GPU that does not know fabric handles.

    An old driver, a GPU that has not joined its NVLink fabric, or a slice of a GPU: CuMem pools on
    it are shared by POSIX file descriptors, within this host alone.
    """
    machine = context.machine
    without = [gpu for gpu in machine.gpus if gpu.is_grace and gpu.supports_fabric is False]
    if machine.num_imex_channels and without and any(True for _ in context.on("cuda")):
        names = ", ".join(str(gpu.index) for gpu in without)
        message = f"an IMEX channel is there, but GPU {names} ({without[0].name}) has no fabric"
        yield Found("CUDA driver", message)


def _first_of_grace(context: Context) -> Gpu | None:
    """Return the first GB device, where engines run on GPUs."""
    if not any(True for _ in context.on("cuda")):
        return None
    return next((gpu for gpu in context.machine.gpus if gpu.is_grace), None)


def _is_on(value: str | None) -> bool:
    return value is not None and value.lower() in ("y", "yes", "1", "on", "true")


def _is_off(value: str | None) -> bool:
    return value is not None and value.lower() in ("n", "no", "0", "off", "false")
