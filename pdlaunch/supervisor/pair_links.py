"""What joins the GPUs of each pair of ranks: from the plan, which says where they run, and from
NVML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from pdlaunch.config.models import LaunchConfig
from pdlaunch.platform.facts import Machine
from pdlaunch.platform.gpu_links import BusPair, GpuLink
from pdlaunch.protocol.control import PairReady
from pdlaunch.resolve.plan import ROLES, plan

ReadLinks = Callable[[Iterable[BusPair]], Mapping[BusPair, GpuLink]]
"""``platform.gpu_links.read_gpu_links``"""

_RENUMBERING = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
"""An engine's own value of these gives ``cuda:0`` another meaning than it has here."""


def gpu_links(
    config: LaunchConfig,
    machine: Machine,
    environ: Mapping[str, str],
    pairs: Sequence[PairReady],
    read: ReadLinks,
) -> list[GpuLink | None]:
    """Of each pair. None: not two GPUs of this host, or the connector does not use what joins them,
    or it is not known.
    """
    if config.kv_transfer.connector != "nixl":
        return [None] * len(pairs)
    bus_ids = _bus_ids(config, machine, environ)
    places = [_place(bus_ids, pair) for pair in pairs]
    links = read(place for place in places if place is not None)
    return [None if place is None else links.get(place) for place in places]


def _place(bus_ids: Mapping[str, str], pair: PairReady) -> BusPair | None:
    puller, holder = bus_ids.get(pair.local), bus_ids.get(pair.peer)
    return None if puller is None or holder is None else (puller, holder)


def _bus_ids(config: LaunchConfig, machine: Machine, environ: Mapping[str, str]) -> dict[str, str]:
    """PCI address of each rank's GPU, where it is known."""
    addresses = {
        f"cuda:{gpu.index}": gpu.pci_bus_id
        for gpu in machine.gpus
        if gpu.pci_bus_id is not None and not gpu.is_slice
    }
    planned = plan(config, machine, environ)
    ranks = [rank for role in ROLES for rank in planned.ranks(role)]
    return {
        rank.name: addresses[rank.devices[0]]
        for rank in ranks
        if rank.devices[0] in addresses
        and not any(name in rank.environment for name in _RENUMBERING)
    }
