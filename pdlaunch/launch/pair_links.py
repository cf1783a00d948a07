"""Finds what joins the GPUs of each pair of ranks.

The plan says where ranks run, and NVML what joins GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from pdlaunch.machine.nvml import BusPair, GpuLink
from pdlaunch.planning.plan import Plan
from pdlaunch.planning.resolve import ResolvedLaunch
from pdlaunch.planning.role_engines import RoleEngines
from pdlaunch.protocol.control import PairReady

ReadLinks = Callable[[Iterable[BusPair]], Mapping[BusPair, GpuLink]]
"""Reads links as ``platform.gpu_links.read_gpu_links`` does."""

_RENUMBERING = "CUDA_DEVICE_ORDER"
"""An engine's own value of it gives ``cuda:0`` another meaning than it has here."""


def gpu_links(
    resolved: ResolvedLaunch, planned: Plan, pairs: Sequence[PairReady], read: ReadLinks
) -> list[GpuLink | None]:
    """Return the link of each pair. ``planned``: the processes of the launch.

    None: the pair is not two GPUs of this host, the connector does not use what joins them, or that
    is not known.
    """
    if resolved.config.kv_transfer.connector != "nixl":
        return [None] * len(pairs)
    bus_ids = _bus_ids(resolved, planned)
    places = [_place(bus_ids, pair) for pair in pairs]
    links = read(place for place in places if place is not None)
    return [None if place is None else links.get(place) for place in places]


def _place(bus_ids: Mapping[str, str], pair: PairReady) -> BusPair | None:
    decode, prefill = bus_ids.get(pair.local), bus_ids.get(pair.peer)
    return None if decode is None or prefill is None else (decode, prefill)


def _bus_ids(resolved: ResolvedLaunch, planned: Plan) -> dict[str, str]:
    """Return the PCI address of each rank's GPU on this host, where it is known."""
    here = resolved.hosts[0].name
    return {
        rank.name: address
        for role, engines in resolved.placed.by_host.get(here, {}).items()
        for rank in planned.ranks(role)
        if rank.host == here
        and _RENUMBERING not in rank.environment
        and (address := _bus_id(engines, rank.devices[0])) is not None
    }


def _bus_id(engines: RoleEngines, device: str) -> str | None:
    """Return the PCI address of a device of the ranks, where it is a whole GPU."""
    gpus = {f"cuda:{place}": gpu for place, gpu in enumerate(engines.gpus)}
    gpu = gpus.get(device)
    return None if gpu is None or gpu.is_slice else gpu.pci_bus_id
