import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.platform.allocator_conf import VARIABLES, read_expandable_segments

CUDA, HIP, ANY = VARIABLES
ON, OFF = "expandable_segments:True", "expandable_segments:False"


@pytest.mark.parametrize(
    ("conf", "enabled"),
    [
        (ON, True),
        (OFF, False),
        (f"{ON},{OFF}", False),
        (f"{OFF},{ON}", True),
        (" expandable_segments : T r u e ", True),
        (f"max_split_size_mb:100,{ON},garbage_collection_threshold:0.5", True),
        (f"roundup_power2_divisions:[256:1,>:4],{ON}", True),
        (f"x:[1,2],{ON}", True),
        (f"{ON},", True),
        (f",{ON}", False),
        ("EXPANDABLE_SEGMENTS:True", False),
        ("max_split_size_mb:100", False),
        ("", False),
        ("garbage", False),
        ("expandable_segments", False),
        ("x:[1", False),
    ],
)
def test_as_torch_2_13_reads_it(conf, enabled):
    """Compared with ``AcceleratorAllocatorConfig::use_expandable_segments`` of libc10."""
    setting = read_expandable_segments({ANY: conf})
    assert (setting.enabled, setting.refused) == (enabled, None)


@pytest.mark.parametrize("value", ["true", "1", "on", "True;x:1"])
def test_values_that_torch_refuses(value):
    setting = read_expandable_segments({ANY: f"expandable_segments:{value}"})
    assert setting.refused == value.partition(":")[0]
    assert setting.enabled is (";" not in value)


@pytest.mark.parametrize(
    ("environ", "variable", "enabled"),
    [
        ({ANY: OFF, CUDA: ON}, CUDA, True),
        ({ANY: ON, CUDA: OFF}, CUDA, False),
        ({ANY: OFF, HIP: ON}, HIP, True),
        ({CUDA: OFF, HIP: ON}, CUDA, False),
        ({ANY: ON, CUDA: ""}, CUDA, False),
        ({ANY: ON, CUDA: "max_split_size_mb:100"}, CUDA, False),
        ({}, None, False),
    ],
)
def test_one_variable_is_read_alone(environ, variable, enabled):
    setting = read_expandable_segments(environ)
    assert (setting.variable, setting.enabled) == (variable, enabled)
    assert set(setting.ignored) == set(environ) - {variable}


@given(st.text())
def test_any_text_is_read(conf):
    read_expandable_segments({ANY: conf})


@pytest.mark.processes
def test_the_installed_torch_agrees():
    """Which variable torch reads, and that it refuses `true`; one process each, for it reads them
    once.
    """
    program = "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environments = [
        {ANY: "a:1", HIP: "b:1", CUDA: "c:1"},
        {ANY: "a:1", HIP: "b:1"},
        {ANY: "expandable_segments:true"},
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=clean | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environ in environments
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert outputs[0][0].strip() == "c:1"
    assert outputs[1][0].strip() == "b:1"
    assert "Expected 'True' or 'False'" in outputs[2][1]
