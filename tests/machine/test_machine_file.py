import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.errors import ConfigError
from pdlaunch.machine.facts import Gpu, LinkedGpus, Machine
from pdlaunch.machine.machine_file import (
    VERSION,
    decode_machine,
    encode_machine,
    read_machine_file,
    recorded_environ,
)
from pdlaunch.machine.probe import probe_machine
from tests.checks.contexts import CPU, GB200, GPU

GPUS = st.builds(
    Gpu,
    st.just(0),
    st.sampled_from(["NVIDIA H200", "NVIDIA GB200"]),
    st.integers(0, 1 << 40),
    st.none() | st.tuples(st.integers(0, 20), st.integers(0, 9)),
    has_virtual_memory=st.none() | st.booleans(),
    has_fabric_handles=st.booleans(),
    pci_bus_id=st.none() | st.just("0000:19:00.0"),
    free_memory_bytes=st.none() | st.integers(0, 1 << 40),
    numa_node=st.none() | st.integers(0, 7),
)


@st.composite
def machines(draw):
    found = draw(st.lists(GPUS, max_size=3))
    gpus = tuple(replace(gpu, index=index) for index, gpu in enumerate(found))
    links = (LinkedGpus(0, 1, "NVLink", 478.1),) if len(gpus) > 1 else ()
    machine = draw(st.sampled_from([CPU, GPU, GB200]))
    return replace(
        machine,
        gpus=gpus,
        gpu_links=links,
        cpus=tuple(sorted(draw(st.sets(st.integers(0, 300), min_size=1)))),
        numa_nodes=draw(st.none() | st.just(((0, 1), (2, 3)))),
        has_native_bf16=draw(st.booleans()),
        driver_cuda=(13, 0) if gpus else None,
        driver_version=draw(st.none() | st.just("580.82.07")),
        rdma_devices=draw(st.sampled_from([(), ("mlx5_0", "mlx5_1")])),
    )


@given(machines())
def test_a_machine_is_read_back_as_it_is(machine):
    assert decode_machine(encode_machine(machine, {}), "m").machine == machine


def test_this_machine_too():
    machine = probe_machine()
    assert decode_machine(encode_machine(machine, {}), "m").machine == machine


def test_what_could_not_be_probed_stays_unknown_with_its_reason():
    machine = replace(Machine(), unknown={"limits": "PermissionError: not for you"})
    text = encode_machine(machine, {})
    assert json.loads(text)["limits"] is None
    assert decode_machine(text, "m").machine.unknown == machine.unknown


def test_facts_that_are_left_out_are_unknown():
    found = decode_machine('{"version": 1, "gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}', "m.json")
    assert set(found.machine.unknown) == {
        "system",
        "cpus",
        "native_bf16",
        "memory",
        "gpu_memory",
        "fabric",
        "driver",
        "cumem",
        "libraries",
        "limits",
        "shm",
        "rdma",
    }
    assert found.machine.unknown["memory"] == "m.json does not say"
    assert found.machine.gpus[0].index == 0


def test_a_machine_without_gpus_has_no_cumem_and_lacks_no_driver():
    machine = decode_machine('{"version": 1, "gpus": []}', "m").machine
    assert not machine.cumem.available
    assert not {"gpus", "cumem", "driver", "gpu_memory", "fabric"} & set(machine.unknown)


@pytest.mark.parametrize(
    ("text", "field", "value", "says"),
    [
        ('{"version": 2, "gpus": [], "new": 1}', "version", 2, "a newer pdlaunch"),
        ('{"gpus": []}', "version", None, "must be the version"),
        ('{"version": true}', "version", True, "must be the version"),
        ('{"version": 1}', "gpus", None, '"gpus": [] says that it has none'),
        ('{"version": 1, "gpus": null}', "gpus", None, "gpus is missing"),
        ('{"version": 1, "gpus": [{"memory_byte": 1}]}', "gpus[0].memory_byte", 1, "unknown field"),
        (
            '{"version": 1, "gpus": [{}, {"memory_bytes": "80GiB"}]}',
            "gpus[1].memory_bytes",
            "80GiB",
            "Expected `int | null`, got `str`",
        ),
        ('{"version": 1, "gpus": [{"index": 3}]}', "gpus[0].index", 3, "must be 0"),
        ('{"version": 1, "gpus": [{"memory_bytes": -1}]}', "gpus[0].memory_bytes", -1, "negative"),
        ('{"version": 1, "gpus": [], "cpus": "7-3"}', "cpus", "7-3", "no list of cores"),
        ('{"version": 1, "gpus": [], "limits": {}}', "limits", {}, "memlock_bytes"),
        ('{"version": 1, "gpus": [], "unknown": {"x": "y"}}', "unknown", {"x": "y"}, "'x'"),
        ('{"version": 1, "gpus": [], "colour": 1}', "colour", 1, "unknown field"),
        (
            '{"version": 1, "gpus": [], "gpu_links": '
            '[{"first": 0, "second": 1, "kind": "PCIe", "gigabytes_per_s": 1}]}',
            "gpu_links[0]",
            [0, 1],
            "must join two",
        ),
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
    assert recorded_environ(environ) == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "UCX_TLS": "tcp",
        "VLLM_API_KEY": "",
    }
    text = encode_machine(GPU, environ)
    assert "hunter2" not in text
    assert "node-7" not in text
    assert decode_machine(text, "m").environ == recorded_environ(environ)


def test_the_version_is_written():
    assert json.loads(encode_machine(CPU, {}))["version"] == VERSION
