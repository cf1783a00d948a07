from pdlaunch.protocol.control import Alive
from pdlaunch.protocol.process.bootstrap import Heartbeat
from pdlaunch.protocol.process.step_record import (
    MAX_REQUESTS,
    SUSPECT_BIT,
    LastStep,
    StepRecord,
    new_step_record,
    read_step_record,
)


def test_a_loop_that_turns_often_beats_once_an_interval_and_makes_up_for_none() -> None:
    now_s, sent = 50.0, list[Alive]()
    heartbeat = Heartbeat(sent.append, 10.0, lambda: now_s)
    for passed_s, num_sent in [(0.0, 1), (9.9, 1), (0.1, 2), (0.0, 2), (100.0, 3), (0.0, 3)]:
        now_s += passed_s
        heartbeat.beat()
        assert len(sent) == num_sent


def test_last_step_is_what_was_written_last() -> None:
    descriptor, seen = new_step_record()
    record = StepRecord(descriptor)
    assert read_step_record(seen) == LastStep()
    record.write([7, 2**63 - 1, 5 | SUSPECT_BIT, 0])
    assert read_step_record(seen) == LastStep(frozenset({7, 2**63 - 1, 5}), frozenset({5}))
    record.write([8, 8 | SUSPECT_BIT])
    assert read_step_record(seen) == LastStep(frozenset({8}), frozenset({8}))
    record.write([])
    assert read_step_record(seen) == LastStep()
    record.write(range(1, 2 * MAX_REQUESTS))
    assert len(read_step_record(seen).origins) == MAX_REQUESTS
    StepRecord(-1).write([1, 2])  # of a rank that nobody watches
