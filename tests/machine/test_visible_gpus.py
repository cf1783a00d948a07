"""CUDA_VISIBLE_DEVICES is read as the driver of CUDA 13 read it on two H200s."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.machine.facts import Gpu, visible_gpus

TWO = (Gpu(0, "NVIDIA H200"), Gpu(1, "NVIDIA H200"))
UUIDS = "GPU-d787c64f-a7b3-89bf-1c2b-44a0524139fd,GPU-696b7a86-ce15-a598-b879-e0a7533c23ed"


def seen(own, outer=None, gpus=TWO):
    found = visible_gpus(gpus, outer, own)
    return found.problem or [gpu.index for gpu in found.gpus]


@pytest.mark.parametrize(
    ("outer", "own", "expected"),
    [
        *((None, own, [0, 1]) for own in (None, "0,1", "0, 1", "0 ,1")),
        *((None, own, []) for own in ("", " ", "-1", "-1,0", ",0")),
        *((None, own, [0]) for own in ("0", "00", "0,-1", "0,", "0,,1")),
        (None, "1,0", [1, 0]),
        (None, "0,1,0", "names a GPU twice"),
        (None, "0,2", "there is no GPU 2 for this launch, which sees 0, 1"),
        *((None, own, "not a list of GPU numbers") for own in ("x", "0;1", "cuda:0", "²", UUIDS)),
        ("2,3", "2,3", [0, 1]),  # what the launch itself has: any meaning will do
        ("2,3", "3,2", [1, 0]),
        ("2,3,-1,0", "2", [0]),
        ("2,3", "0", "there is no GPU 0 for this launch, which sees 2, 3"),
        (UUIDS, UUIDS, [0, 1]),
        (UUIDS, "0", "the launch's own CUDA_VISIBLE_DEVICES has UUIDs"),
        ("5", "1", [1]),  # a machine of two GPUs is assumed in a shell that has this
    ],
)
def test_as_cuda_reads_it_also_where_the_launch_has_one_of_its_own(outer, own, expected):
    found = seen(own, outer)
    assert expected in found if isinstance(expected, str) else found == expected


def test_a_launch_without_gpus_gives_none():
    for outer in ("", None):
        assert seen("0", outer, ()) == "there is no GPU 0 for this launch, which sees none"
        assert seen(outer, outer, ()) == []


@given(st.one_of(st.none(), st.text()), st.text())
def test_any_text_is_read(outer, own):
    found = visible_gpus(TWO, outer, own)
    assert not (found.gpus and found.problem)
    assert len(set(found.gpus)) == len(found.gpus)
