"""What joins GPUs, as NVML tells it. A stand-in for ``pynvml`` plays machines that are not here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from pdlaunch.machine.cuda_driver import read_gpus
from pdlaunch.machine.facts import Gpu, GpuLink
from pdlaunch.machine.probe import read_nvml_facts

NOT_FOUND, NO_MORE_LINKS, NOT_SUPPORTED = 6, 2, 3
GPU, CPU, SWITCH, UNKNOWN = 0, 1, 2, 255
A, B, C = "0000:19:00.0", "0000:3b:00.0", "0001:00:07.0"
HOPPER_MBPS = 26562
GPUS = (Gpu(0, "NVIDIA H200", pci_bus_id=A), Gpu(1, "NVIDIA H200", pci_bus_id=B))


@dataclass(frozen=True)
class Card:
    """A GPU as NVML describes it. ``links``: kind or address of what is at the other end; None: the
    link is down.
    """

    links: tuple[int | str | None, ...] = (SWITCH,) * 18
    speed_mbps: int = HOPPER_MBPS
    pcie: tuple[int, int] = (5, 16)
    free_bytes: int = 130 << 30


@dataclass
class FakeNvml:
    cards: dict[str, Card] = field(default_factory=lambda: {A: Card(), B: Card()})
    p2p: dict[int, int] = field(default_factory=lambda: {0: 0, 2: 0})
    """Status of reads (0) and NVLink (2) between any two."""
    ancestor: int = 20
    known_fields: tuple[int, ...] = (90, 164)
    missing: tuple[str, ...] = ()
    open_count: int = 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            return getattr(pynvml, name)
        if name in self.missing:

            def refuse(*_: object) -> None:
                raise pynvml.NVMLError(NOT_FOUND)

            return refuse
        return self.answers()[name]

    def answers(self) -> dict[str, Callable[..., object]]:
        return {
            "nvmlInit": lambda: self.count(1),
            "nvmlShutdown": lambda: self.count(-1),
            "nvmlDeviceGetHandleByPciBusId": self.handle,
            "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(free=card.free_bytes),
            "nvmlDeviceGetP2PStatus": lambda one, other, way: self.p2p[way],
            "nvmlDeviceGetTopologyCommonAncestor": lambda one, other: self.ancestor,
            "nvmlDeviceGetMaxPcieLinkGeneration": lambda card: card.pcie[0],
            "nvmlDeviceGetMaxPcieLinkWidth": lambda card: card.pcie[1],
            "nvmlDeviceGetNvLinkState": self.state,
            "nvmlDeviceGetNvLinkRemoteDeviceType": self.remote_type,
            "nvmlDeviceGetNvLinkRemotePciInfo": self.remote_pci,
            "nvmlDeviceGetFieldValues": self.field_values,
        }

    def count(self, change: int) -> None:
        self.open_count += change

    def handle(self, bus_id: bytes) -> Card:
        if bus_id.decode() not in self.cards:
            raise pynvml.NVMLError(NOT_FOUND)
        return self.cards[bus_id.decode()]

    def state(self, card: Card, number: int) -> bool:
        if number >= len(card.links):
            raise pynvml.NVMLError(NO_MORE_LINKS)
        return card.links[number] is not None

    def remote_type(self, card: Card, number: int) -> object:
        remote = card.links[number]
        return GPU if isinstance(remote, str) else remote

    def remote_pci(self, card: Card, number: int) -> SimpleNamespace:
        numbers = [int(part, 16) for part in re.split("[:.]", str(card.links[number]))[:3]]
        return SimpleNamespace(**dict(zip(("domain", "bus", "device"), numbers, strict=True)))

    def field_values(self, card: Card, fields: list[tuple[int, int]]) -> list[SimpleNamespace]:
        ((number, _),) = fields
        code = 0 if number in self.known_fields else NOT_SUPPORTED
        value = SimpleNamespace(uiVal=card.speed_mbps)
        return [SimpleNamespace(nvmlReturn=code, valueType=1, value=value)]


def link_of(nvml: Any, peer: str = B) -> GpuLink | None:
    gpus = (GPUS[0], Gpu(1, "NVIDIA H200", pci_bus_id=peer))
    _, links = read_nvml_facts(gpus, nvml)
    return links[0] if links else None


def test_h200s_behind_nvlink_switches() -> None:
    """NV18 in ``nvidia-smi topo -m``, 26.562 GB/s in ``nvidia-smi nvlink -s``."""
    nvml = FakeNvml()
    speed = pytest.approx(478.116)
    assert link_of(nvml) == GpuLink(0, 1, "NVLink", speed, "18 NVLinks with 478 GB/s")
    assert nvml.open_count == 0


def test_only_links_that_are_up_and_lead_to_the_peer_count() -> None:
    assert link_of(FakeNvml({A: Card(), B: Card((SWITCH, None) * 9)})).text.startswith("9 NVLinks")
    links = (B, B, C, C, C, CPU)
    nvml = FakeNvml({A: Card(links, 25000), B: Card((A, A), 25000), C: Card((A, A, A), 25000)})
    assert link_of(nvml).text == "2 NVLinks with 50 GB/s"
    assert link_of(nvml, C).gigabytes_per_s == 75


@pytest.mark.parametrize(
    "nvml",
    [
        FakeNvml(dict.fromkeys((A, B), Card((UNKNOWN,) * 18))),
        FakeNvml(missing=("nvmlDeviceGetNvLinkRemoteDeviceType",)),
        FakeNvml(known_fields=(90,)),
    ],
    ids=["out of sight", "no remote type", "older driver"],
)
def test_what_older_drivers_and_virtual_machines_hide(nvml: FakeNvml) -> None:
    assert link_of(nvml).text == "18 NVLinks with 478 GB/s"


def test_pcie_where_there_is_no_nvlink() -> None:
    cards = {A: Card((), pcie=(4, 16)), B: Card((), pcie=(5, 8))}
    assert link_of(FakeNvml(cards, p2p={0: 0, 2: 5})).text == "PCIe 4.0 x8 with 15.8 GB/s"


@pytest.mark.parametrize(
    "nvml",
    [
        FakeNvml(p2p={0: 1, 2: 1}),
        FakeNvml(p2p={0: 0, 2: 5}, ancestor=50),
        FakeNvml(p2p={0: 0, 2: 5}, cards=dict.fromkeys((A, B), Card((), pcie=(9, 16)))),
        FakeNvml(known_fields=()),
        FakeNvml(dict.fromkeys((A, B), Card((None,) * 18))),
        FakeNvml({A: Card()}),
        FakeNvml(missing=("nvmlDeviceGetP2PStatus",)),
        FakeNvml(missing=("nvmlInit",)),
    ],
    ids=["no-way", "sockets", "new-PCIe", "no-speed", "down", "no-GPU", "old-driver", "no-NVML"],
)
def test_what_is_not_known_is_left_out(nvml: FakeNvml) -> None:
    assert link_of(nvml) is None


def test_free_memory_is_told_of_each_whole_gpu() -> None:
    a_slice = Gpu(2, "NVIDIA H200 MIG 1g.18gb", pci_bus_id=A)
    gpus, links = read_nvml_facts((*GPUS, a_slice), FakeNvml({A: Card(free_bytes=5 << 30)}))
    assert [gpu.free_memory_bytes for gpu in gpus] == [5 << 30, None, None]
    assert links == ()
    assert read_nvml_facts(GPUS, FakeNvml(missing=("nvmlInit",))) == (GPUS, ())
    gpus, links = read_nvml_facts(GPUS, FakeNvml(missing=("nvmlDeviceGetMemoryInfo",)))
    assert [gpu.free_memory_bytes for gpu in gpus] == [None, None]
    assert len(links) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no CUDA device")
def test_the_real_nvml() -> None:
    gpus, links = read_nvml_facts(read_gpus())
    assert all(gpu.free_memory_bytes for gpu in gpus)
    if all(gpu.name == "NVIDIA H200" for gpu in gpus):
        assert {link.text for link in links} <= {"18 NVLinks with 478 GB/s"}
