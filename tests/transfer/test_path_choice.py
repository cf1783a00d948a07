"""The trial of paths, with READs that the test controls."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors import scratch
from pdlaunch.transfer.connectors.connector import Read, ReadState
from pdlaunch.transfer.connectors.scratch import (
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
from tests.clock import FakeClock

# A quarter of a gigabyte that nothing reads or writes.
LANDING = torch.zeros(10**9 // 4, dtype=torch.uint8)


@dataclass(eq=False)
class FakeRead(Read):
    state: Any
    time_s: float

    def poll(self) -> ReadState:
        return self.state

    def seconds(self) -> float:
        return self.time_s


@dataclass
class FakePath:
    # Time of each READ; further READs take the last time.
    times_s: list[float] = field(default_factory=lambda: [0.25])
    state: Any = "done"
    refusal: str = ""
    is_right: bool = True


class Trial:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, **paths: FakePath) -> None:
        self.clock = FakeClock()
        self.started: list[str] = []
        self.open: list[FakeRead] = []
        self.paths = paths
        is_right = lambda *_: paths[self.started[-1]].is_right  # noqa: E731
        monkeypatch.setattr(scratch, "has_pattern", is_right)
        names = {"agent_name": "a#1", "clock": self.clock, "timeout_s": 9.0}
        self.steps = try_paths(self.start, self.open.remove, list(paths), **names)

    def start(self, name: str) -> tuple[Read, torch.Tensor]:
        path = self.paths[name]
        if path.refusal:
            raise TransferError(path.refusal)
        self.started.append(name)
        time_s = path.times_s.pop(0) if len(path.times_s) > 1 else path.times_s[0]
        self.open.append(FakeRead(path.state, time_s))
        return self.open[-1], LANDING

    def figures(self) -> list[PathFigure]:
        with pytest.raises(StopIteration) as end:
            next(self.steps)
        return end.value.value


def test_the_fastest_warm_read_counts_and_the_fastest_path_wins(monkeypatch) -> None:
    nixl, p2p = FakePath([9.0, 0.01, 0.005, 0.01]), FakePath([5.0, 0.0025, 0.004, 0.004])
    trial = Trial(monkeypatch, nixl=nixl, p2p=p2p)
    figures = trial.figures()
    assert [str(figure) for figure in figures] == ["50 GB/s", "100 GB/s"]
    assert best_path(figures).path == "p2p"
    assert len(trial.started) == 2 * (1 + NUM_WARM_READS)


def test_a_slow_path_is_timed_once_and_of_nearly_equal_ones_the_first_is_taken(monkeypatch) -> None:
    trial = Trial(monkeypatch, first=FakePath([9.0, 0.251]), second=FakePath([9.0, 0.25]))
    best = best_path(trial.figures())
    assert (best.path, round(best.gigabytes_per_s, 2)) == ("first", 1.0)
    assert len(trial.started) == 4


def test_paths_that_cannot_be_used_say_why(monkeypatch) -> None:
    paths = {
        "refused": FakePath(refusal="not on this host"),
        "failed": FakePath(state="failed"),
        "wrong": FakePath(is_right=False),
    }
    errors = ["not on this host", "the first READ failed", "the first READ brought wrong bytes"]
    trial = Trial(monkeypatch, **paths, good=FakePath())
    figures = trial.figures()
    assert best_path(figures).path == "good"
    assert [figure.error for figure in figures] == [*errors, ""]
    assert not trial.open
    with pytest.raises(TransferError, match=r"refused: not on .*; failed: the .*; wrong: the"):
        best_path(figures[:3])


def test_a_path_that_hangs_costs_its_share_of_the_time_and_its_read_stays_open(monkeypatch) -> None:
    trial = Trial(monkeypatch, hanging=FakePath(state="pending"), good=FakePath())
    next(trial.steps)
    trial.clock.now += 2.9
    next(trial.steps)
    trial.clock.now += 0.2
    figures = trial.figures()
    assert best_path(figures).path == "good"
    assert figures[0].error == "the first READ did not end within 3 s"
    assert [read.state for read in trial.open] == ["pending"]


def test_the_pattern_of_a_scratch_is_that_of_its_agent() -> None:
    memory, _ = new_landing(SCRATCH_BYTES, torch.device("cpu"), 1 << 30)
    write_pattern(memory, "a#1")
    pattern = hashlib.shake_256(b"a#1").digest(PATTERN_BYTES)
    assert memory.numpy().tobytes() == pattern * (SCRATCH_BYTES // PATTERN_BYTES)
    assert has_pattern(memory, "a#1")
    assert not has_pattern(memory, "a#2")
    memory[-1] ^= 1
    assert not has_pattern(memory, "a#1")
