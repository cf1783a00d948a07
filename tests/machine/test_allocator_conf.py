"""Reading torch's allocator settings, as torch takes them."""

import pytest

from pdlaunch.machine.host import ALLOCATOR_VARIABLES, expandable_segments_variable

CUDA, HIP, ANY = ALLOCATOR_VARIABLES
ON, OFF = "expandable_segments:True", "expandable_segments:False"


@pytest.mark.parametrize(
    ("text", "enabled"),
    [
        (ON, True),
        (OFF, False),
        (f"{ON},{OFF}", False),
        (f"{OFF},{ON}", True),
        (" expandable_segments : T r u e ", True),
        (f"max_split_size_mb:100,{ON},garbage_collection_threshold:0.5", True),
        (f"roundup_power2_divisions:[256:1,>:4],{ON}", True),
        ("", False),
        # Refused, and meant as True.
        ("expandable_segments:1", True),
        ("expandable_segments:true", True),
        ("EXPANDABLE_SEGMENTS:True", False),
    ],
)
def test_expandable_segments_as_torch_takes_them(text, enabled):
    assert expandable_segments_variable({ANY: text}) == (ANY if enabled else None)


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({ANY: OFF, CUDA: ON}, CUDA),
        ({ANY: ON, CUDA: OFF}, None),
        ({ANY: OFF, HIP: ON}, HIP),
        ({ANY: ON, CUDA: ""}, None),
        ({}, None),
    ],
)
def test_one_variable_is_read_alone(environ, variable):
    assert expandable_segments_variable(environ) == variable
