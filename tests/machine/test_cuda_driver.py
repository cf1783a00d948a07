import ctypes

import pytest

from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.machine.probe import DriverError, load_library, read_gpus

ATTRIBUTES = {102: 1, 128: 1}


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


def test_devices_whose_fabric_handles_need_an_imex_channel(tmp_path):
    for has_channel in (False, True):
        found = Gpu(1, "NVIDIA H200", 140 << 30, True, has_channel, "0000:1a:00.0")
        assert read_gpus(FakeDriver, tmp_path)[1] == found
        (tmp_path / "channel0").touch()


def test_what_older_drivers_do_not_tell(tmp_path):
    (tmp_path / "channel0").touch()
    fake = FakeDriver(attributes={}, errors={"cuDeviceGetPCIBusId": 1})
    gpu = read_gpus(lambda: fake, tmp_path)[0]
    assert gpu == Gpu(0, "NVIDIA H200", 140 << 30, False, False)


@pytest.mark.parametrize(
    ("load", "says"),
    [
        (lambda: FakeDriver(errors={"cuInit": 100}), r"cuInit failed: CUDA_ERROR_NO_DEVICE \(100"),
        (lambda: FakeDriver(num_gpus=0), "cuDeviceGetCount: no CUDA device"),
        (lambda: ctypes.CDLL(None), "has no cuInit"),
        (lambda: load_library("libcuda-of-no-machine.so.1"), "no CUDA driver"),
    ],
)
def test_a_failing_call_is_named(tmp_path, load, says):
    with pytest.raises(DriverError, match=says):
        read_gpus(load, tmp_path)


GOOD, BAD = Gpu(0, has_virtual_memory=True), Gpu(1, has_virtual_memory=False)


@pytest.mark.parametrize(
    ("machine", "problem"),
    [
        (Machine(gpus=(GOOD,)), ""),
        (Machine(gpus=(GOOD, BAD)), "no virtual memory management on device 1"),
        (Machine(), "no CUDA device"),
        (Machine(driver_error="cuInit failed"), "cuInit failed"),
        (Machine(system="Darwin"), "need Linux"),
    ],
)
def test_cumem_needs_virtual_memory_management_everywhere(machine, problem):
    assert problem in machine.cumem_problem
    assert bool(problem) == bool(machine.cumem_problem)
