import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.errors import ConfigError
from pdlaunch.machine.facts import Gpu, Machine
from pdlaunch.machine.machine_file import decode_machine, encode_machine, read_machine_file
from pdlaunch.machine.probe import probe_machine
from pdlaunch.machine.profiles import PROFILES, find_profile
from tests.checks.contexts import CPU, GB200, GPU

GPUS = st.builds(
    Gpu,
    name=st.sampled_from(["NVIDIA H200", "NVIDIA GB200"]),
    memory_bytes=st.integers(0, 1 << 40),
    has_virtual_memory=st.booleans(),
    has_fabric_handles=st.booleans(),
    pci_bus_id=st.none() | st.just("0000:19:00.0"),
    free_memory_bytes=st.none() | st.integers(0, 1 << 40),
)


@st.composite
def machines(draw):
    found = draw(st.lists(GPUS, max_size=3))
    gpus = tuple(replace(gpu, index=index) for index, gpu in enumerate(found))
    return replace(
        draw(st.sampled_from([CPU, GPU, GB200])),
        gpus=gpus,
        num_cpus=draw(st.integers(1, 300)),
        has_native_bf16=draw(st.booleans()),
        rdma_devices=draw(st.sampled_from([(), ("mlx5_0", "mlx5_1")])),
    )


@given(machines())
def test_a_machine_is_read_back_as_it_is(machine):
    assert decode_machine(encode_machine(machine, {}), "m").machine == machine


@pytest.mark.parametrize("name", ["this machine", *PROFILES])
def test_this_machine_and_profiles_too(name):
    profile = find_profile(name, 2)
    machine = probe_machine() if profile is None else profile.machine
    assert decode_machine(encode_machine(machine, {}), name).machine == machine


def test_what_could_not_be_probed_stays_unknown_with_its_reason():
    machine = replace(Machine(), unknown={"shm": "PermissionError: not for you"})
    text = encode_machine(machine, {})
    assert json.loads(text)["shm_free_bytes"] is None
    assert decode_machine(text, "m").machine.unknown == machine.unknown


def test_facts_that_are_left_out_are_unknown():
    found = decode_machine('{"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}', "m.json")
    left_out = {"system", "cpus", "memory", "gpu_memory", "fabric", "cumem", "shm"}
    assert found.machine.unknown == dict.fromkeys(sorted(left_out), "m.json does not say")
    assert found.machine.gpus[0].index == 0


@pytest.mark.parametrize(
    ("text", "field", "value", "says"),
    [
        ('{"gpus": null}', "gpus", None, '"gpus": [] says that it has none'),
        ('{"gpus": [{"memory_byte": 1}]}', "gpus[0].memory_byte", 1, "Unexpected"),
        (
            '{"gpus": [{}, {"memory_bytes": "80"}]}',
            "gpus[1].memory_bytes",
            "80",
            "valid integer",
        ),
        ('{"gpus": [{"memory_bytes": -1}]}', "gpus[0].memory_bytes", -1, "equal to"),
        ('{"gpus": [], "num_cpus": 0}', "num_cpus", 0, "equal to 1"),
        ('{"gpus": [], "colour": 1}', "colour", 1, "Unexpected"),
        ("[]", None, [], "must hold an object"),
        ("{", None, None, "is not JSON"),
    ],
)
def test_bad_files_name_field_value_and_fix(text, field, value, says):
    with pytest.raises(ConfigError) as caught:
        decode_machine(text, "m.json")
    error = caught.value
    assert str(error).startswith("m.json")
    assert (error.field, error.value) == (field, value)
    assert error.fix
    assert says in f"{error} {error.fix}"


@given(st.text() | st.binary())
def test_no_text_does_more_than_be_refused(text):
    with pytest.raises(ConfigError):
        decode_machine(text, "m")


@pytest.mark.parametrize("name", ["none.json", ".", "a\0b"])
def test_files_that_cannot_be_read(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_machine_file(tmp_path / name)


def test_of_the_environment_only_what_rules_read_is_kept():
    environ = {
        "UCX_TLS": "tcp",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "VLLM_API_KEY": "hunter2",
        "HF_TOKEN": "hunter2",
        "PDLAUNCH_API_KEY": "hunter2",
        "HOSTNAME": "node-7",
    }
    text = encode_machine(GPU, environ)
    assert "hunter2" not in text
    assert "node-7" not in text
    assert decode_machine(text, "m").environ == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "UCX_TLS": "tcp",
    }


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
def test_profiles_by_name(name, gpu, number, fabric):
    machine = find_profile(name, 2).machine
    assert [item.name for item in machine.gpus] == [gpu] * number
    assert {item.has_fabric_handles for item in machine.gpus} == {fabric}
    assert {"shm"} <= set(machine.unknown)


@pytest.mark.parametrize("name", ["", "h100x", "h100x0", "h100x9999", "cpux2", "x8", "b300", "٣x٣"])
def test_names_of_no_machine(name):
    assert find_profile(name, 2) is None
