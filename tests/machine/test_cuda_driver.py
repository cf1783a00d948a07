import ctypes
from pathlib import Path

import pytest

from pdlaunch.machine.cuda_driver import (
    Driver,
    DriverError,
    judge_cumem,
    load_library,
    probe_cumem,
    read_driver,
)
from pdlaunch.machine.facts import Gpu

ATTRIBUTES = {75: 9, 76: 0, 102: 1, 128: 1}


class FakeDriver:
    """Plays libcuda: every entry point writes through the pointers it is given."""

    def __init__(self, num_gpus=2, attributes=ATTRIBUTES, errors=None):
        self.num_gpus = num_gpus
        self.attributes = attributes
        self.errors = errors or {}

    def __getattr__(self, name):
        if name not in self.ENTRY_POINTS:
            raise AttributeError(name)
        return lambda *arguments: (
            self.errors.get(name) or self.ENTRY_POINTS[name](self, *arguments) or 0
        )

    def get_attribute(self, value, attribute, device):
        if attribute not in self.attributes:
            return 1
        value._obj.value = self.attributes[attribute]
        return 0

    def get_name(self, buffer, length, device):
        buffer.value = b"NVIDIA H200"

    def total_mem(self, value, device):
        value._obj.value = 140 << 30

    def get_pci_bus_id(self, buffer, length, device):
        buffer.value = f"0000:{0x19 + device:02x}:00.0".encode()

    ENTRY_POINTS = {
        "cuInit": lambda self, flags: 0,
        "cuDriverGetVersion": lambda self, value: setattr(value._obj, "value", 13020),
        "cuDeviceGetCount": lambda self, value: setattr(value._obj, "value", self.num_gpus),
        "cuDeviceGet": lambda self, value, index: setattr(value._obj, "value", index),
        "cuDeviceGetName": get_name,
        "cuDeviceTotalMem_v2": total_mem,
        "cuDeviceGetAttribute": get_attribute,
        "cuDeviceGetPCIBusId": get_pci_bus_id,
        "cuGetErrorName": lambda self, code, name: setattr(
            name._obj, "value", b"CUDA_ERROR_NO_DEVICE"
        ),
    }


def test_devices_and_version(tmp_path):
    (tmp_path / "channel0").touch()
    driver = read_driver(FakeDriver, tmp_path)
    assert driver.cuda_version == (13, 2)
    assert driver.gpus[1] == Gpu(
        1,
        "NVIDIA H200",
        140 << 30,
        (9, 0),
        has_virtual_memory=True,
        has_fabric_handles=True,
        pci_bus_id="0000:1a:00.0",
    )


def test_a_device_without_an_address(tmp_path):
    driver = read_driver(lambda: FakeDriver(errors={"cuDeviceGetPCIBusId": 1}), tmp_path)
    assert driver.gpus[0].pci_bus_id is None


def test_mig_devices_are_slices():
    assert Gpu(0, "NVIDIA H200 MIG 1g.18gb").is_slice
    assert not Gpu(0, "NVIDIA H200").is_slice


def test_fabric_handles_need_an_imex_channel(tmp_path):
    assert read_driver(FakeDriver, tmp_path).gpus[0].has_fabric_handles is False
    assert read_driver(FakeDriver, tmp_path / "none").gpus[0].has_fabric_handles is False


def test_a_failing_call_is_named(tmp_path):
    with pytest.raises(DriverError, match=r"cuInit failed: CUDA_ERROR_NO_DEVICE \(100\)"):
        read_driver(lambda: FakeDriver(errors={"cuInit": 100}), tmp_path)


def test_an_old_driver_lacks_entry_points(tmp_path):
    with pytest.raises(DriverError, match="has no cuInit"):
        read_driver(lambda: ctypes.CDLL(None), tmp_path)


def test_no_library():
    with pytest.raises(DriverError, match="no CUDA driver"):
        load_library("libcuda-of-no-machine.so.1")


@pytest.mark.parametrize(
    ("driver", "system", "available", "reason"),
    [
        (Driver((13, 0), (Gpu(0, has_virtual_memory=True),)), "linux", True, "every device"),
        (
            Driver((13, 0), (Gpu(0, has_virtual_memory=True), Gpu(1, has_virtual_memory=False))),
            "linux",
            False,
            "device 1",
        ),
        (Driver((13, 0), (Gpu(0),)), "linux", False, "device 0"),
        (Driver((13, 0), ()), "linux", False, "no CUDA device"),
        (Driver((13, 0), (Gpu(0, has_virtual_memory=True),)), "win32", False, "need Linux"),
    ],
)
def test_cumem_needs_virtual_memory_management_everywhere(driver, system, available, reason):
    found = judge_cumem(driver, system)
    assert found.available is available
    assert reason in found.reason


@pytest.mark.parametrize(
    "error",
    [
        DriverError("cuInit failed"),
        OSError("gone"),
        RuntimeError("odd"),
        ctypes.ArgumentError("bad"),
    ],
)
def test_the_probe_never_raises(error):
    def read():
        raise error

    found = probe_cumem(read)
    assert not found.available
    assert str(error) in found.reason


def test_the_question_has_an_answer_here():
    assert probe_cumem().available in (True, False)


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no CUDA device")
def test_a_real_driver():
    driver = read_driver()
    assert driver.gpus
    assert all(gpu.memory_bytes and gpu.compute_capability for gpu in driver.gpus)
    assert probe_cumem().available
