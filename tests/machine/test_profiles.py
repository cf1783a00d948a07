import pytest

from pdlaunch.machine.machine_file import decode_machine, encode_machine
from pdlaunch.machine.profiles import PROFILES, find_profile


@pytest.mark.parametrize("name", PROFILES)
def test_each_can_be_written_and_read(name):
    profile = find_profile(name, 2)
    found = decode_machine(encode_machine(profile.machine, {}, profile.about), name)
    assert found.machine == profile.machine
    assert found.about == profile.about


@pytest.mark.parametrize(
    ("name", "gpu", "number", "fabric"),
    [
        ("h100x8", "NVIDIA H100 80GB HBM3", 8, False),
        ("H200X2", "NVIDIA H200", 2, False),
        ("a100", "NVIDIA A100-SXM4-80GB", 8, False),
        ("gb200", "NVIDIA GB200", 4, True),
        ("l40s", "NVIDIA L40S", 8, False),
    ],
)
def test_names(name, gpu, number, fabric):
    machine = find_profile(name, 2).machine
    assert [item.name for item in machine.gpus] == [gpu] * number
    assert {item.has_fabric_handles for item in machine.gpus} == {fabric}
    assert len(machine.gpu_links) == number * (number - 1) // 2
    assert {"libraries", "limits", "shm"} <= set(machine.unknown)


def test_gpus_of_any_kind_are_as_many_as_ranks():
    machine = find_profile("cuda", 3).machine
    assert len(machine.gpus) == 3
    assert {"gpu_memory", "fabric", "cumem", "driver"} <= set(machine.unknown)


@pytest.mark.parametrize("name", ["", "h100x", "h100x0", "h100x9999", "cpux2", "x8", "b300", "٣x٣"])
def test_names_of_no_machine(name):
    assert find_profile(name, 2) is None
