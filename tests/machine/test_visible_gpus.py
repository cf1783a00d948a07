"""CUDA_VISIBLE_DEVICES is read as the driver of CUDA 13 read it on two H200s."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.machine.facts import Gpu
from pdlaunch.machine.visible_gpus import visible_gpus

FIRST, SECOND = (
    "GPU-696b7a86-ce15-a598-b879-e0a7533c23ed",
    "GPU-d787c64f-a7b3-89bf-1c2b-44a0524139fd",
)
TWO = (Gpu(0, "NVIDIA H200", uuid=FIRST), Gpu(1, "NVIDIA H200", uuid=SECOND))
UNKNOWN = tuple(replace(gpu, uuid=None) for gpu in TWO)
SLICE = Gpu(0, "NVIDIA H200 MIG 1g.18gb", uuid="MIG-11111111-2222-3333-4444-555555555555")


def seen(own, outer=None, gpus=TWO):
    found = visible_gpus(gpus, outer, own)
    return found.problem or [gpu.index for gpu in found.gpus]


@pytest.mark.parametrize(
    ("values", "indices"),
    [
        ([None, "0,1", "0, 1", "0 ,1"], [0, 1]),
        (["", " ", "-1", "-1,0", ",0"], []),
        (["0", "00", "0,-1", "0,", "0,,1"], [0]),
        (["1", "1,-1,0", SECOND, SECOND.upper(), "GPU-d"], [1]),
        (["1,0", f"{SECOND},{FIRST}"], [1, 0]),
    ],
)
def test_as_cuda_reads_it(values, indices):
    for own in values:
        assert seen(own) == indices, own


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["0,0", "0,1,0"], "names 0 twice"),
        ([f"{SECOND},{SECOND}", f"{SECOND},GPU-d787"], "twice"),
        (["2", "0,2"], "there is no GPU 2 for this launch, which sees 0, 1"),
        (["99999999999"], "there is no GPU 99999999999"),
        (["x", "0;1", "cuda:0", "all", "GPU-", "²"], "is neither the number nor the UUID of a GPU"),
        (["GPU-00000000"], "there is no GPU GPU-00000000 for this launch"),
        ([f"0,{SECOND}", f"{SECOND},0"], "mixes numbers and UUIDs"),
    ],
)
def test_what_cuda_refuses_or_drops_is_a_problem(values, problem):
    for own in values:
        assert problem in seen(own), own


@pytest.mark.parametrize(
    ("outer", "own", "expected"),
    [
        ("2,3", "2,3", [0, 1]),  # what the launch itself has: any meaning will do
        ("2,3", "3", [1]),
        ("2,3", "3,2", [1, 0]),
        ("2,3,-1,0", "2", [0]),
        ("2,3", "0", "there is no GPU 0 for this launch, which sees 2, 3"),
        (f"{SECOND},{FIRST}", "0", "the launch's own CUDA_VISIBLE_DEVICES has UUIDs"),
        (f"{SECOND},{FIRST}", "GPU-d", [1]),
        ("5", "1", [1]),  # a machine of two GPUs is assumed in a shell that has this
    ],
)
def test_under_a_variable_of_the_whole_launch(outer, own, expected):
    found = seen(own, outer)
    assert expected in found if isinstance(expected, str) else found == expected


def test_a_gpu_that_the_whole_launch_names_twice():
    assert "it names 0 twice" in seen("0,0", "0,0", ())
    assert "it names 0 twice" in seen("1,0,0", "1,0,0", ())
    assert seen("0,1", "0,1", ()) == []
    assert seen(None, None, ()) == []


def test_a_launch_without_gpus_gives_none():
    assert seen("0", "", ()) == "there is no GPU 0 for this launch, which sees none"
    assert seen("0", None, ()) == "there is no GPU 0 for this launch, which sees none"


class TestSlices:
    def test_a_process_sees_one(self):
        found = visible_gpus((SLICE,), None, f"{SLICE.uuid},MIG-99")
        assert found.gpus == (SLICE,)

    def test_those_of_other_processes_are_not_known_to_the_launch(self):
        (gpu,) = visible_gpus((SLICE,), None, "MIG-22222222-2222").gpus
        assert gpu.index == -1
        assert gpu.is_slice
        assert gpu.memory_bytes is None

    def test_two_of_them_are_two(self):
        first, second = (visible_gpus(TWO, None, f"MIG-{number}").gpus for number in "12")
        assert first != second


def test_uuids_of_an_assumed_machine_are_not_known():
    (gpu,) = visible_gpus(UNKNOWN, None, SECOND).gpus
    assert (gpu.index, gpu.name) == (-1, SECOND)


@given(st.one_of(st.none(), st.text()), st.text())
def test_any_text_is_read(outer, own):
    found = visible_gpus(TWO, outer, own)
    assert not (found.gpus and found.problem)
    assert isinstance(visible_gpus((), outer, outer).problem, str)
    assert len(set(found.gpus)) == len(found.gpus)
