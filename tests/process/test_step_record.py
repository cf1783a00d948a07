"""What a rank computed last is known after its death, whichever it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pdlaunch.process.step_record import SUSPECT_BIT, LastStep, StepRecord, read_step_record, record_path


def test_last_step_is_what_was_written_last(tmp_path: Path) -> None:
    path = record_path(tmp_path, "decode-0")
    record = StepRecord(path, 4)
    assert read_step_record(path) == LastStep()
    record.write([7, 2**63 - 1, 5 | SUSPECT_BIT, 0])
    assert read_step_record(path) == LastStep(frozenset({7, 2**63 - 1, 5}), frozenset({5}))
    record.write([8])
    assert read_step_record(path) == LastStep(frozenset({8}))
    record.write([])
    assert read_step_record(path) == LastStep()


def test_choices_of_one_request_are_one_origin_and_a_suspect_if_one_of_them_is(tmp_path: Path) -> None:
    path = record_path(tmp_path, "decode-0")
    StepRecord(path, 4).write([7, 7 | SUSPECT_BIT, 7])
    assert read_step_record(path) == LastStep(frozenset({7}), frozenset({7}))


def test_outlives_its_process(tmp_path: Path) -> None:
    path = record_path(tmp_path, "decode-0")
    code = (
        "import os, signal, sys, pathlib; from pdlaunch.process.step_record import StepRecord;"
        "StepRecord(pathlib.Path(sys.argv[1]), 3).write([3, 4]); os.kill(os.getpid(), signal.SIGSEGV)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -11
    assert read_step_record(path) == LastStep(frozenset({3, 4}))


def test_new_incarnation_begins_without_the_steps_of_the_one_before(tmp_path: Path) -> None:
    path = record_path(tmp_path, "decode-0")
    StepRecord(path, 4).write([7])
    StepRecord(path, 4)
    assert read_step_record(path) == LastStep()


def test_engine_that_has_written_nothing(tmp_path: Path) -> None:
    assert read_step_record(record_path(tmp_path, "decode-0")) == LastStep()
