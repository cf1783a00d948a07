import ctypes
import itertools
import re
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from pdlaunch.machine.cuda_driver import read_driver
from pdlaunch.machine.gpu_links import (
    GpuLink,
    NvLink,
    NvmlError,
    load_nvml,
    open_nvml,
    read_gpu_links,
)

NOT_FOUND = 6
NO_MORE_LINKS = 2
NOT_SUPPORTED = 3
UNSIGNED_INT = 1
GPU, CPU, SWITCH, UNKNOWN = 0, 1, 2, 255
A, B, C = "0000:19:00.0", "0000:3b:00.0", "0001:00:07.0"
HOPPER_MBPS = 26562


def memory_of(pointer, num_bytes):
    """What nvml.h says is there, whatever the structure in Python is."""
    assert ctypes.sizeof(pointer._obj) == num_bytes
    return (ctypes.c_char * num_bytes).from_buffer(pointer._obj)


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
    """Plays libnvidia-ml: every entry point writes through the pointers it is given."""

    cards: dict[str, Card] = field(default_factory=lambda: {A: Card(), B: Card()})
    p2p: tuple[int, ...] = (0, 0, 0)
    """Status of reads, writes and NVLink between any two."""
    ancestor: int = 20
    known_fields: tuple[int, ...] = (90, 164)
    missing: tuple[str, ...] = ()
    open_count: int = 0

    def __getattr__(self, name):
        if name in self.missing or name not in self.ENTRY_POINTS:
            raise AttributeError(name)
        return lambda *arguments: self.ENTRY_POINTS[name](self, *arguments) or 0

    def card(self, device):
        return list(self.cards.values())[device.value - 1]

    def init(self):
        self.open_count += 1

    def shutdown(self):
        self.open_count -= 1

    def handle(self, bus_id, device):
        if bus_id.decode() not in self.cards:
            return NOT_FOUND
        device._obj.value = 1 + list(self.cards).index(bus_id.decode())
        return 0

    def state(self, device, link, value):
        links = self.card(device).links
        if link >= len(links):
            return NO_MORE_LINKS
        value._obj.value = int(links[link] is not None)
        return 0

    def remote_type(self, device, link, value):
        remote = self.card(device).links[link]
        value._obj.value = GPU if isinstance(remote, str) else remote

    def remote_pci(self, device, link, pci):
        address = self.card(device).links[link]
        numbers = [int(part, 16) for part in re.split("[:.]", address)[:3]]
        struct.pack_into("16s5I32s", memory_of(pci, 68), 0, address.encode(), *numbers, 0, 0, b"")

    def field_values(self, device, count, values):
        assert count == 1
        memory = memory_of(values, 40)
        field_id, scope_id = struct.unpack_from("II", memory)
        code = 0 if field_id in self.known_fields else NOT_SUPPORTED
        struct.pack_into(
            "IIqqIIQ",
            memory,
            0,
            field_id,
            scope_id,
            0,
            0,
            UNSIGNED_INT,
            code,
            self.card(device).speed_mbps,
        )

    def p2p_status(self, first, second, way, value):
        value._obj.value = self.p2p[way]

    def memory_info(self, device, info):
        memory = memory_of(info, 24)
        struct.pack_into("<QQQ", memory, 0, 140 << 30, self.card(device).free_bytes, 10 << 30)

    def driver_version(self, buffer, length):
        buffer.value = b"580.82.07"

    ENTRY_POINTS = {
        "nvmlDeviceGetMemoryInfo": memory_info,
        "nvmlSystemGetDriverVersion": driver_version,
        "nvmlInit_v2": init,
        "nvmlShutdown": shutdown,
        "nvmlDeviceGetHandleByPciBusId_v2": handle,
        "nvmlDeviceGetNvLinkState": state,
        "nvmlDeviceGetNvLinkRemoteDeviceType": remote_type,
        "nvmlDeviceGetNvLinkRemotePciInfo_v2": remote_pci,
        "nvmlDeviceGetFieldValues": field_values,
        "nvmlDeviceGetP2PStatus": p2p_status,
        "nvmlDeviceGetTopologyCommonAncestor": lambda self, first, second, value: setattr(
            value._obj, "value", self.ancestor
        ),
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda self, device, value: setattr(
            value._obj, "value", self.card(device).pcie[0]
        ),
        "nvmlDeviceGetMaxPcieLinkWidth": lambda self, device, value: setattr(
            value._obj, "value", self.card(device).pcie[1]
        ),
    }


def link_of(nvml, pair=(A, B)):
    return read_gpu_links([pair], lambda: nvml).get(pair)


def test_h200s_behind_nvlink_switches():
    """NV18 in ``nvidia-smi topo -m``, 26.562 GB/s in ``nvidia-smi nvlink -s``."""
    nvml = FakeNvml()
    assert link_of(nvml) == GpuLink("NVLink", pytest.approx(478.116), "18 NVLinks with 478 GB/s")
    assert nvml.open_count == 0


def test_links_that_are_down_do_not_count():
    nvml = FakeNvml({A: Card(), B: Card((SWITCH, None) * 9)})
    assert link_of(nvml).text == "9 NVLinks with 239 GB/s"


def test_only_links_to_the_peer_count_without_a_switch():
    links = (B, B, C, C, C, CPU)
    nvml = FakeNvml({A: Card(links, 25000), B: Card((A, A), 25000), C: Card((A, A, A), 25000)})
    assert link_of(nvml).text == "2 NVLinks with 50 GB/s"
    assert link_of(nvml, (A, C)).gigabytes_per_s == 75


def test_what_is_out_of_sight_is_a_switch():
    assert (
        link_of(FakeNvml(dict.fromkeys((A, B), Card((UNKNOWN,) * 18)))).text
        == "18 NVLinks with 478 GB/s"
    )
    assert (
        link_of(FakeNvml(missing=("nvmlDeviceGetNvLinkRemoteDeviceType",))).text
        == "18 NVLinks with 478 GB/s"
    )


def test_older_drivers_know_the_common_speed_alone():
    assert link_of(FakeNvml(known_fields=(90,))).text == "18 NVLinks with 478 GB/s"


@pytest.mark.parametrize(
    ("cards", "text"),
    [
        ((Card((), pcie=(5, 16)), Card((), pcie=(5, 16))), "PCIe 5.0 x16 with 63 GB/s"),
        ((Card((), pcie=(4, 16)), Card((), pcie=(5, 8))), "PCIe 4.0 x8 with 15.8 GB/s"),
    ],
)
def test_pcie_where_there_is_no_nvlink(cards, text):
    assert link_of(FakeNvml(dict(zip((A, B), cards, strict=True)), p2p=(0, 0, 5))).text == text


@pytest.mark.parametrize(
    "nvml",
    [
        FakeNvml(p2p=(1, 1, 1)),
        FakeNvml(p2p=(0, 0, 5), ancestor=50),
        FakeNvml(p2p=(0, 0, 5), cards=dict.fromkeys((A, B), Card((), pcie=(9, 16)))),
        FakeNvml(known_fields=()),
        FakeNvml(dict.fromkeys((A, B), Card((None,) * 18))),
        FakeNvml({A: Card()}),
        FakeNvml(missing=("nvmlDeviceGetP2PStatus",)),
        FakeNvml(missing=("nvmlInit_v2",)),
        FakeNvml(missing=("nvmlDeviceGetFieldValues",)),
    ],
    ids=[
        "no way",
        "two sockets",
        "new PCIe",
        "no speed",
        "all down",
        "no such GPU",
        "old driver",
        "no NVML",
        "no fields",
    ],
)
def test_what_is_not_known_is_left_out(nvml):
    assert link_of(nvml) is None


def test_one_pair_that_is_not_known_costs_the_others_nothing():
    assert list(read_gpu_links([(A, B), (A, C), (B, B)], FakeNvml)) == [(A, B)]


def test_nvml_is_left_alone_where_nothing_is_asked():
    def load():
        raise AssertionError("nobody has asked")

    assert read_gpu_links([], load) == {}


def test_no_library():
    assert read_gpu_links([(A, B)], lambda: load_nvml("libnvidia-ml-of-no-machine.so.1")) == {}
    with pytest.raises(NvmlError, match="no NVML"):
        load_nvml("libnvidia-ml-of-no-machine.so.1")
    with pytest.raises(NvmlError, match="has no nvmlInit_v2"), open_nvml(lambda: ctypes.CDLL(None)):
        pass


def test_a_failing_call_is_named():
    with (
        open_nvml(FakeNvml) as nvml,
        pytest.raises(NvmlError, match=r"nvmlDeviceGetHandleByPciBusId_v2 failed: error 6"),
    ):
        nvml.nvlinks(C)


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no CUDA device")
def test_the_real_nvml():
    gpus = read_driver().gpus
    with open_nvml() as nvml:
        for gpu in gpus:
            generation, lanes = nvml.pcie(gpu.pci_bus_id)
            assert generation >= 1
            assert lanes >= 1
            links = nvml.nvlinks(gpu.pci_bus_id)
            assert all(5 < link.gigabytes_per_s < 500 for link in links)
            if gpu.name == "NVIDIA H200" and links:
                assert {replace(link, peer=None) for link in links} == {
                    NvLink(HOPPER_MBPS / 1000, None)
                }
    pairs = list(itertools.combinations((gpu.pci_bus_id for gpu in gpus), 2))
    found = read_gpu_links(pairs)
    if all(gpu.name == "NVIDIA H200" for gpu in gpus):
        assert {found[pair].text for pair in pairs} <= {"18 NVLinks with 478 GB/s"}
