"""What a rank computed last is known after its death, whichever it was."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pdlaunch.protocol.process.step_record import (
    MAX_REQUESTS,
    SUSPECT_BIT,
    LastStep,
    StepRecord,
    new_step_record,
    read_step_record,
)


def test_last_step_is_what_was_written_last() -> None:
    descriptor, seen = new_step_record()
    record = StepRecord(descriptor)
    assert read_step_record(seen) == LastStep()
    record.write([7, 2**63 - 1, 5 | SUSPECT_BIT, 0])
    assert read_step_record(seen) == LastStep(frozenset({7, 2**63 - 1, 5}), frozenset({5}))
    record.write([8])
    assert read_step_record(seen) == LastStep(frozenset({8}))
    record.write([])
    assert read_step_record(seen) == LastStep()


def test_choices_of_one_request_are_one_origin_and_a_suspect_if_one_of_them_is() -> None:
    descriptor, seen = new_step_record()
    StepRecord(descriptor).write([7, 7 | SUSPECT_BIT, 7])
    assert read_step_record(seen) == LastStep(frozenset({7}), frozenset({7}))


@pytest.mark.processes
def test_outlives_its_process() -> None:
    descriptor, seen = new_step_record()
    code = (
        "import os, signal, sys; from pdlaunch.protocol.process.step_record import StepRecord;"
        "StepRecord(int(sys.argv[1])).write([3, 4]); os.kill(os.getpid(), signal.SIGSEGV)"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code, str(descriptor)], pass_fds=[descriptor])
    finally:
        os.close(descriptor)
    assert done.returncode == -11
    assert read_step_record(seen) == LastStep(frozenset({3, 4}))


def test_more_requests_than_it_holds_do_no_harm() -> None:
    descriptor, seen = new_step_record()
    StepRecord(descriptor).write(range(1, 2 * MAX_REQUESTS))
    assert len(read_step_record(seen).origins) == MAX_REQUESTS


def test_rank_that_nobody_watches_writes_all_the_same() -> None:
    StepRecord(-1).write([1, 2])
