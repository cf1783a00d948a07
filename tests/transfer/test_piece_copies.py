from __future__ import annotations

import ctypes
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.transfer.connectors import piece_copies
from pdlaunch.transfer.connectors.connector import Read
from pdlaunch.transfer.connectors.piece_copies import HostCopier, Pieces
from tests.interpreter import needs_triton, run_interpreted

SIZE = 4
NUM_SLOTS = 16

slots = st.permutations(range(NUM_SLOTS))


def pieces_of(destination: np.ndarray, source: np.ndarray, to: list[int], of: list[int]) -> Pieces:
    return Pieces(
        np.array(to, dtype=np.uint64) * np.uint64(SIZE) + np.uint64(destination.ctypes.data),
        np.array(of, dtype=np.uint64) * np.uint64(SIZE) + np.uint64(source.ctypes.data),
        SIZE,
    )


def wait(copy: Read) -> str:
    future = copy._future  # type: ignore[attr-defined]
    future.exception(timeout=60)
    return copy.poll()


@given(to=slots, of=slots, count=st.integers(1, NUM_SLOTS))
def test_merged_pieces_move_the_same_bytes_in_the_fewest_copies(
    to: list[int], of: list[int], count: int
) -> None:
    source = np.arange(NUM_SLOTS * SIZE, dtype=np.uint8)
    expected, found = np.zeros_like(source), np.zeros_like(source)
    for here, there in zip(to[:count], of[:count], strict=True):
        expected[here * SIZE : (here + 1) * SIZE] = source[there * SIZE : (there + 1) * SIZE]
    columns = pieces_of(found, source, to[:count], of[:count]).merged
    for destination, address, size in zip(*(column.tolist() for column in columns), strict=True):
        ctypes.memmove(destination, address, size)
    np.testing.assert_array_equal(found, expected)
    steps = zip(to[:count], to[1:count], of[:count], of[1:count], strict=False)
    assert len(columns[0]) == 1 + sum((b - a, d - c) != (1, 1) for a, b, c, d in steps)


def test_a_copy_that_breaks_has_failed() -> None:
    def move(destination: int, source: int, num_bytes: int) -> None:
        raise OSError("bad memory")

    copier = HostCopier(move)
    memory = np.zeros(64, dtype=np.uint8)
    assert wait(copier.start(pieces_of(memory, memory, [0], [1]))) == "failed"
    copier.close()


@given(count=st.integers(1, NUM_SLOTS), part_bytes=st.integers(1, NUM_SLOTS * SIZE))
def test_parts_are_the_whole_one_after_another(count: int, part_bytes: int) -> None:
    memory = np.zeros(NUM_SLOTS * SIZE, dtype=np.uint8)
    whole = pieces_of(memory, memory, list(range(count)), list(range(count))[::-1])
    with patch.object(piece_copies, "PART_BYTES", part_bytes):
        parts = whole.parts
    for of in ("destinations", "sources"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(part, of) for part in parts]), getattr(whole, of)
        )
    assert all(len(part.sources) * SIZE <= max(SIZE, part_bytes) for part in parts)


class FakeEvent:
    def __init__(self) -> None:
        self.has_passed = False

    def query(self) -> bool:
        return self.has_passed


def test_a_copy_on_a_gpu_knows_which_parts_have_landed() -> None:
    """It is over when the last one is there."""
    from pdlaunch.transfer.connectors.cuda_copies import CudaCopy

    ends: list[Any] = [FakeEvent() for _ in range(3)]
    copy = CudaCopy(ends[0], ends, [4, 4, 1])
    assert copy.parts() == [(4, ends[0]), (8, ends[1]), (9, ends[2])]
    steps = []
    for passed in (1, 0, 2):
        ends[passed].has_passed = True
        steps.append(copy.poll())
    assert steps == ["pending", "pending", "done"]


@pytest.mark.processes
@needs_triton
@pytest.mark.processes
def test_the_kernel_equals_plain_copies() -> None:
    run_interpreted("tests.transfer.interpreted_peer_kernel")
