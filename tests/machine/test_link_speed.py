"""What a link should give: GPUs of a machine, memory of a host, network devices of a kernel."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from pdlaunch.machine.facts import GpuLink, Machine
from pdlaunch.machine.link_speed import (
    between_gpus,
    measure_copy_gigabytes_per_s,
    over_network,
    within_cpus,
)
from tests.checks.contexts import GPU

ONE = GPU.gpus[0]
THREE = Machine(gpus=tuple(replace(ONE, index=index) for index in range(3)))
NVLINK = tuple(GpuLink(*pair, "NVLink", 478.0) for pair in ((0, 1), (0, 2), (1, 2)))


def network(folder: Path, device: str, speed: str, *, is_real: bool = True) -> Path:
    """Write what the kernel tells of a network device."""
    (folder / device).mkdir()
    (folder / device / "speed").write_text(f"{speed}\n")
    if is_real:
        (folder / device / "device").mkdir()
    return folder


def rdma(folder: Path, name: str, rate: str, state: str = "4: ACTIVE") -> Path:
    port = folder / name / "ports" / "1"
    port.mkdir(parents=True)
    (port / "rate").write_text(f"{rate}\n")
    (port / "state").write_text(f"{state}\n")
    return folder


def test_gpus_that_are_all_joined_alike() -> None:
    found = between_gpus(replace(THREE, gpu_links=NVLINK))
    assert found.gigabytes_per_s == 0.75 * 478
    assert "NVLink with 478 GB/s" in found.text
    slots = tuple(replace(link, kind="PCIe", gigabytes_per_s=63.0) for link in NVLINK)
    assert between_gpus(replace(THREE, gpu_links=slots)).gigabytes_per_s == 0.8 * 63


@pytest.mark.parametrize(
    "machine",
    [
        replace(THREE, gpu_links=NVLINK[:2]),
        replace(THREE, gpu_links=(*NVLINK[:2], replace(NVLINK[2], gigabytes_per_s=63.0))),
        THREE,
    ],
    ids=["one is not known", "one is slower", "none is known"],
)
def test_gpus_that_are_not_joined_alike_tell_nothing(machine: Machine) -> None:
    found = between_gpus(machine)
    assert found.gigabytes_per_s is None
    assert "3 GPUs" in found.text


def test_one_gpu_has_no_link() -> None:
    assert between_gpus(Machine(gpus=(ONE,))).gigabytes_per_s is None


def test_memory_gives_a_share_of_a_copy() -> None:
    found = within_cpus(32.0)
    assert found.gigabytes_per_s == 0.5
    assert "32 GB/s" in found.text


def test_the_best_copy_counts() -> None:
    """Copies of 16 MiB that take 4, 2, 8, 8 and 8 ms by the injected clock."""
    times_s = itertools.accumulate([0, 0.004, 1, 0.002, 1, 0.008, 1, 0.008, 1, 0.008])
    speed = measure_copy_gigabytes_per_s(lambda: next(times_s))
    assert speed == pytest.approx(16 * 1024**2 / 0.002 / 1e9)


def test_a_network_device_carries_what_its_driver_tells(tmp_path: Path) -> None:
    found = over_network("eth0", network(tmp_path, "eth0", "100000"), tmp_path / "no")
    assert found.gigabytes_per_s == 12.5
    assert found.text == "eth0 with 100 Gbit/s"


@pytest.mark.parametrize(
    ("speed", "is_real", "below", "says"),
    [
        ("50000", False, "lower_eth0", "50 Gbit/s"),  # a device upon others is as real as they
        ("-1", True, "", "does not tell"),
        ("", True, "", "does not tell"),
        # Each pair of virtual Ethernet says 10 Gbit/s, which is nobody's speed.
        ("10000", False, "", "virtual device"),
    ],
)
def test_what_devices_tell(
    tmp_path: Path, speed: str, is_real: bool, below: str, says: str
) -> None:
    network(tmp_path, "bond0", speed, is_real=is_real)
    if below:
        (tmp_path / "bond0" / below).mkdir()
    found = over_network("bond0", tmp_path, tmp_path / "no")
    assert (found.gigabytes_per_s == 6.25) is bool(below)
    assert says in found.text


def test_rdma_goes_past_the_network_device(tmp_path: Path) -> None:
    net, infiniband = tmp_path / "net", tmp_path / "infiniband"
    net.mkdir()
    network(net, "eth0", "10000")
    rdma(infiniband, "mlx5_0", "100 Gb/sec (2X HDR)")
    rdma(infiniband, "mlx5_1", "400 Gb/sec (4X NDR)")
    rdma(infiniband, "mlx5_2", "800 Gb/sec (8X NDR)", state="1: DOWN")
    found = over_network("eth0", net, infiniband)
    assert found.gigabytes_per_s == 50
    assert "mlx5_1/1" in found.text
