"""The trial of paths, with READs that end when and as the test says."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import Read, ReadState
from pdlaunch.transfer.connectors.scratch import (
    DEVICE_SCRATCH_BYTES,
    NUM_WARM_READS,
    PATTERN_BYTES,
    SCRATCH_BYTES,
    PathFigure,
    best_path,
    has_pattern,
    new_landing,
    piece_offsets,
    try_paths,
    write_pattern,
)
from tests.transfer.fakes import FakeClock

LANDING = torch.zeros(10**9 // 4, dtype=torch.uint8)
"""A quarter of a gigabyte; nothing reads or writes it."""


@dataclass
class FakePath:
    times_s: list[float] = field(default_factory=lambda: [0.25])
    """Of each READ; the last one for all further ones."""
    state: Any = "done"
    refusal: str = ""
    is_right: bool = True


@dataclass(eq=False)
class FakeRead(Read):
    reads: FakeReads
    path: str
    time_s: float

    def poll(self) -> ReadState:
        assert self in self.reads.open
        return self.reads.paths[self.path].state

    def seconds(self) -> float:
        assert self in self.reads.open
        return self.time_s

    def release(self) -> None:
        assert self.poll() != "pending"
        self.reads.open.remove(self)


class FakeReads:
    def __init__(self, **paths: FakePath) -> None:
        self.paths = paths
        self.started: list[str] = []
        self.open: list[FakeRead] = []
        self.abandoned: list[FakeRead] = []

    def read_scratch(self, path: str) -> tuple[Read, torch.Tensor]:
        found = self.paths[path]
        if found.refusal:
            raise TransferError(found.refusal)
        self.started.append(path)
        times_s = found.times_s
        time_s = times_s.pop(0) if len(times_s) > 1 else times_s[0]
        self.open.append(FakeRead(self, path, time_s))
        return self.open[-1], LANDING

    def release(self, read: Read) -> None:
        read.release()

    def abandon(self, read: Any, landing: torch.Tensor) -> None:
        self.abandoned.append(read)


def trial_of(reads: FakeReads, clock: FakeClock | None = None) -> Generator[None, None, Any]:
    def is_right(landing: torch.Tensor) -> bool:
        return reads.paths[reads.started[-1]].is_right

    return try_paths(
        reads, list(reads.paths), is_right=is_right, clock=clock or FakeClock(), timeout_s=9.0
    )


def ended(trial: Generator[None, None, Any]) -> list[PathFigure]:
    with pytest.raises(StopIteration) as end:
        next(trial)
    return end.value.value


def test_the_fastest_warm_read_counts_and_the_fastest_path_wins() -> None:
    reads = FakeReads(
        nixl=FakePath([9.0, 0.01, 0.005, 0.01]), p2p=FakePath([5.0, 0.0025, 0.004, 0.004])
    )
    figures = ended(trial_of(reads))
    assert [(figure.path, figure.gigabytes_per_s) for figure in figures] == [
        ("nixl", 50.0),
        ("p2p", 100.0),
    ]
    assert best_path(figures).path == "p2p"
    assert [str(figure) for figure in figures] == ["50 GB/s", "100 GB/s"]
    assert not reads.open
    assert len(reads.started) == 2 * (1 + NUM_WARM_READS)


def test_of_paths_that_are_nearly_equal_the_first_is_taken() -> None:
    reads = FakeReads(first=FakePath([0.101]), second=FakePath([0.1]))
    assert best_path(ended(trial_of(reads))).path == "first"


def test_a_slow_path_is_timed_once() -> None:
    reads = FakeReads(only=FakePath([9.0, 0.25]))
    assert best_path(ended(trial_of(reads))).gigabytes_per_s == 1.0
    assert len(reads.started) == 2


def test_paths_that_cannot_be_used_say_why() -> None:
    reads = FakeReads(
        refused=FakePath(refusal="not on this host"),
        failed=FakePath(state="failed"),
        wrong=FakePath(is_right=False),
        good=FakePath(),
    )
    figures = ended(trial_of(reads))
    assert best_path(figures).path == "good"
    assert {figure.path: figure.error for figure in figures} == {
        "refused": "not on this host",
        "failed": "the first READ failed",
        "wrong": "the first READ brought wrong bytes",
        "good": "",
    }
    assert not reads.open


def test_without_any_path_every_reason_is_told() -> None:
    both = ended(trial_of(FakeReads(a=FakePath(refusal="no"), b=FakePath(state="failed"))))
    with pytest.raises(TransferError, match="a: no; b: the first READ failed"):
        best_path(both)
    with pytest.raises(TransferError, match=r"^no$"):
        best_path(ended(trial_of(FakeReads(a=FakePath(refusal="no")))))


def test_a_path_that_hangs_costs_its_share_of_the_time_and_its_read_is_handed_over() -> None:
    clock, reads = FakeClock(), FakeReads(hanging=FakePath(state="pending"), good=FakePath())
    trial = trial_of(reads, clock)
    next(trial)
    clock.now += 2.9
    next(trial)
    clock.now += 0.2
    figures = ended(trial)
    assert best_path(figures).path == "good"
    assert figures[0].error == "the first READ did not end within 3 s"
    assert [handle.path for handle in reads.abandoned] == ["hanging"]


def test_a_single_path_has_as_long_as_the_handshake() -> None:
    clock, reads = FakeClock(), FakeReads(only=FakePath(state="pending"))
    trial = trial_of(reads, clock)
    next(trial)
    clock.now += 1000
    next(trial)
    trial.close()
    assert [handle.path for handle in reads.abandoned] == ["only"]


def test_the_pattern_of_a_scratch_is_that_of_its_agent() -> None:
    scratch = new_landing(SCRATCH_BYTES, torch.device("cpu"))
    write_pattern(scratch, "a#1")
    pattern = hashlib.shake_256(b"a#1").digest(PATTERN_BYTES)
    assert scratch.numpy().tobytes() == pattern * (SCRATCH_BYTES // PATTERN_BYTES)
    assert has_pattern(scratch, "a#1")
    assert not has_pattern(scratch, "a#2")
    scratch[-1] ^= 1
    assert not has_pattern(scratch, "a#1")


@pytest.mark.parametrize("scratch_bytes", [SCRATCH_BYTES, DEVICE_SCRATCH_BYTES])
@pytest.mark.parametrize(
    ("block_bytes", "size", "share"),
    [
        ((3 << 20, 1 << 21), 1 << 21, 1),
        ((3 << 20, 9 << 20), 1 << 21, 1),
        ((1 << 30, 24 << 10), 16 << 10, 1),
        ((8 << 10, 8 << 10), 8 << 10, 1 / 2),
        ((5 << 10, 1 << 30), 4 << 10, 1 / 4),
        ((1, 1 << 30), 4 << 10, 1 / 4),
    ],
)
def test_pieces_are_about_as_large_as_a_block_and_begin_the_scratch(
    scratch_bytes: int, block_bytes: tuple[int, int], size: int, share: float
) -> None:
    offsets, piece_bytes = piece_offsets(scratch_bytes, *block_bytes)
    assert piece_bytes == size
    assert offsets == list(reversed(range(0, int(scratch_bytes * share), size)))
    assert len(offsets) * size % PATTERN_BYTES == 0
