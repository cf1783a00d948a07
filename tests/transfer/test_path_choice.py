"""The trial of paths, with READs that end when and as the test says."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors import scratch
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
    try_paths,
    write_pattern,
)
from tests.transfer.fakes import FakeClock

CPU = torch.device("cpu")
# A quarter of a gigabyte; nothing reads or writes it.
LANDING = torch.zeros(10**9 // 4, dtype=torch.uint8)


@dataclass
class FakePath:
    # Of each READ; the last one for all further ones.
    times_s: list[float] = field(default_factory=lambda: [0.25])
    state: Any = "done"
    refusal: str = ""
    is_right: bool = True


@dataclass(eq=False)
class FakeRead(Read):
    path: FakePath
    time_s: float

    def poll(self) -> ReadState:
        return self.path.state

    def seconds(self) -> float:
        return self.time_s


@dataclass
class Trial:
    """Tries paths whose READs do as they are told."""

    paths: dict[str, FakePath]
    clock: FakeClock = field(default_factory=FakeClock)
    started: list[str] = field(default_factory=list)
    open: list[FakeRead] = field(default_factory=list)

    def start(self, path: str) -> tuple[Read, torch.Tensor]:
        found = self.paths[path]
        if found.refusal:
            raise TransferError(found.refusal)
        self.started.append(path)
        time_s = found.times_s.pop(0) if len(found.times_s) > 1 else found.times_s[0]
        self.open.append(FakeRead(found, time_s))
        return self.open[-1], LANDING

    def begin(self, monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, Any]:
        monkeypatch.setattr(
            scratch, "has_pattern", lambda *_: self.paths[self.started[-1]].is_right
        )
        return try_paths(
            self.start,
            self.open.remove,
            list(self.paths),
            agent_name="a#1",
            clock=self.clock,
            timeout_s=9.0,
        )


def ended(trial: Generator[None, None, Any]) -> list[PathFigure]:
    with pytest.raises(StopIteration) as end:
        next(trial)
    return end.value.value


def test_the_fastest_warm_read_counts_and_the_fastest_path_wins(monkeypatch) -> None:
    nixl, p2p = FakePath([9.0, 0.01, 0.005, 0.01]), FakePath([5.0, 0.0025, 0.004, 0.004])
    trial = Trial({"nixl": nixl, "p2p": p2p})
    figures = ended(trial.begin(monkeypatch))
    assert [str(figure) for figure in figures] == ["50 GB/s", "100 GB/s"]
    assert best_path(figures).path == "p2p"
    assert len(trial.started) == 2 * (1 + NUM_WARM_READS)


def test_a_slow_path_is_timed_once_and_of_nearly_equal_ones_the_first_is_taken(monkeypatch) -> None:
    trial = Trial({"first": FakePath([9.0, 0.251]), "second": FakePath([9.0, 0.25])})
    best = best_path(ended(trial.begin(monkeypatch)))
    assert (best.path, round(best.gigabytes_per_s, 2)) == ("first", 1.0)
    assert len(trial.started) == 4


def test_paths_that_cannot_be_used_say_why(monkeypatch) -> None:
    paths = {
        "refused": FakePath(refusal="not on this host"),
        "failed": FakePath(state="failed"),
        "wrong": FakePath(is_right=False),
    }
    errors = ["not on this host", "the first READ failed", "the first READ brought wrong bytes"]
    trial = Trial({**paths, "good": FakePath()})
    figures = ended(trial.begin(monkeypatch))
    assert best_path(figures).path == "good"
    assert [figure.error for figure in figures] == [*errors, ""]
    assert not trial.open
    with pytest.raises(TransferError, match=r"refused: not on .*; failed: the .*; wrong: the"):
        best_path(figures[:3])
    with pytest.raises(TransferError, match=r"^not on this host$"):
        best_path(figures[:1])


def test_a_path_that_hangs_costs_its_share_of_the_time_and_its_read_stays_open(monkeypatch) -> None:
    trial = Trial({"hanging": FakePath(state="pending"), "good": FakePath()})
    steps = trial.begin(monkeypatch)
    next(steps)
    trial.clock.now += 2.9
    next(steps)
    trial.clock.now += 0.2
    figures = ended(steps)
    assert best_path(figures).path == "good"
    assert figures[0].error == "the first READ did not end within 3 s"
    assert [read.path for read in trial.open] == [trial.paths["hanging"]]


def test_a_single_path_has_as_long_as_the_handshake(monkeypatch) -> None:
    trial = Trial({"only": FakePath(state="pending")})
    steps = trial.begin(monkeypatch)
    next(steps)
    trial.clock.now += 1000
    next(steps)
    steps.close()
    assert len(trial.open) == 1


def test_the_pattern_of_a_scratch_is_that_of_its_agent() -> None:
    memory, _ = new_landing(SCRATCH_BYTES, CPU, 1 << 30)
    write_pattern(memory, "a#1")
    pattern = hashlib.shake_256(b"a#1").digest(PATTERN_BYTES)
    assert memory.numpy().tobytes() == pattern * (SCRATCH_BYTES // PATTERN_BYTES)
    assert has_pattern(memory, "a#1")
    assert not has_pattern(memory, "a#2")
    memory[-1] ^= 1
    assert not has_pattern(memory, "a#1")


@pytest.mark.parametrize("scratch_bytes", [SCRATCH_BYTES, DEVICE_SCRATCH_BYTES])
@pytest.mark.parametrize(
    ("block_bytes", "size", "share"),
    [
        (3 << 20, 1 << 21, 1),
        (24 << 10, 16 << 10, 1),
        (8 << 10, 8 << 10, 1 / 2),
        (5 << 10, 4 << 10, 1 / 4),
        (1, 4 << 10, 1 / 4),
    ],
)
def test_pieces_are_about_as_large_as_a_block_and_begin_the_scratch(
    scratch_bytes: int, block_bytes: int, size: int, share: float
) -> None:
    landing, piece_bytes = new_landing(scratch_bytes, CPU, block_bytes)
    assert piece_bytes == size
    assert landing.numel() == int(scratch_bytes * share)
    assert landing.numel() % piece_bytes == landing.numel() % PATTERN_BYTES == 0
