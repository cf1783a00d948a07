"""Rules PD446 and PD447 judge whether Mooncake's protocol fits the devices of this host."""

from __future__ import annotations

from collections.abc import Iterator

from pdlaunch.checks.context import Context
from pdlaunch.checks.rule import Found, rule
from pdlaunch.config.problems import nearest, shown_name

_PROTOCOL = "kv_transfer.mooncake.protocol"
_DEVICES = "kv_transfer.mooncake.devices"


@rule(
    "PD446",
    "error",
    fix=f"Set {_PROTOCOL}: tcp, or use connector nixl.",
    source="/sys/class/infiniband.",
    needs=("rdma",),
)
def rdma_without_device(context: Context) -> Iterator[Found]:
    """Mooncake's protocol is rdma, and a device that it needs is not there.

    Its transfer engine finds no device at its start, and every rank ends with that error.
    """
    settings = context.config.kv_transfer.mooncake
    if not context.uses("mooncake") or settings.protocol != "rdma":
        return
    there = context.machine.rdma_devices
    if not there:
        yield Found(_PROTOCOL, "the protocol is rdma, but this host has no RDMA device")
        return
    for name in filter(None, map(str.strip, settings.devices.split(","))):
        if name not in there:
            meant = nearest(name, there)
            message = f"there is no RDMA device {shown_name(name)}; there are {', '.join(there)}"
            fix = f"did you mean {meant}?" if meant else "name one that is there"
            yield Found(_DEVICES, message, fix)


@rule(
    "PD447",
    "error",
    fix=f"Set {_PROTOCOL}: tcp, or run both sides on GPUs.",
    source="MC_INTRA_NVLINK of Mooncake 0.3.13: it moves device memory alone.",
    needs=("gpus",),
)
def nvlink_on_cpu(context: Context) -> Iterator[Found]:
    """Mooncake's protocol is nvlink, and an engine computes on the CPU.

    NVLink joins GPUs: memory of the host has no way there.
    """
    if context.uses("mooncake") and context.config.kv_transfer.mooncake.protocol == "nvlink":
        for engine in context.peers("cpu"):
            yield Found(_PROTOCOL, f"the protocol is nvlink, but {engine.role} runs on the CPU")
