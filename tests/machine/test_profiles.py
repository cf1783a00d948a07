"""Machines by name, and what is kept of a machine on its way to the supervisor."""

import pytest

from pdlaunch.errors import ConfigError
from pdlaunch.machine.host import recorded_environ
from pdlaunch.machine.profiles import find_machine


def test_of_the_environment_only_what_rules_read_is_kept():
    kept = {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "UCX_TLS": "tcp",
    }
    secrets = dict.fromkeys(("VLLM_API_KEY", "HF_TOKEN", "PDLAUNCH_API_KEY"), "hunter2")
    assert recorded_environ(kept | secrets | {"HOSTNAME": "node-7"}) == kept


@pytest.mark.parametrize(
    ("name", "gpu", "number", "fabric"),
    [
        ("h100x8", "NVIDIA H100 80GB HBM3", 8, False),
        ("H200X2", "NVIDIA H200", 2, False),
        ("gb200", "NVIDIA GB200", 4, True),
        ("l40s", "NVIDIA L40S", 8, False),
    ],
)
def test_profiles_by_name(name, gpu, number, fabric):
    machine = find_machine(name, 2, "--assume").machine
    assert [item.name for item in machine.gpus] == [gpu] * number
    assert {item.has_fabric_handles for item in machine.gpus} == {fabric}
    assert {"shm"} <= set(machine.unknown)


@pytest.mark.parametrize("name", ["", "h100x", "h100x0", "h100x9999", "cpux2", "x8", "b300", "٣x٣"])
def test_names_of_no_machine(name):
    with pytest.raises(ConfigError, match="is not one of"):
        find_machine(name, 2, "--assume")
