import contextlib
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from pdlaunch.protocol.control import Alive, Failed, to_supervisor
from pdlaunch.protocol.process.bootstrap import Bootstrap, Heartbeat
from pdlaunch.protocol.process.step_record import (
    MAX_REQUESTS,
    SUSPECT_BIT,
    LastStep,
    StepRecord,
    new_step_record,
    read_step_record,
)
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from tests.engine.server.conftest import engine_spec


class BusySupervisor(SecureContext):
    """Lets a child connect so late that one which does not wait would be gone."""

    def callback(self, domain: str, key: bytes) -> bool:
        time.sleep(0.2)
        return super().callback(domain, key)


@pytest.mark.processes
def test_the_cause_of_a_ranks_end_reaches_a_busy_supervisor(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "pdlaunch.engine", "--name", "both-0/rank-0")
    with (
        contextlib.closing(BusySupervisor(keys := new_launch_keys())) as context,
        subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0) as rank,
    ):
        socket, control = context.listen(zmq.ROUTER, f"ipc://{tmp_path}/control")
        bootstrap = Bootstrap(
            name="both-0/rank-0",
            incarnation=1,
            control=control,
            keys=keys,
            run_dir=str(tmp_path),
            log_level="info",
            engine_json=engine_spec(tmp_path / "no-model").model_dump_json(),
        )
        assert rank.stdin is not None
        rank.stdin.write(msgspec.json.encode(bootstrap) + b"\n")
        message = None
        while not isinstance(message, Failed):
            assert socket.poll(120_000), "its cause was lost"
            message = to_supervisor.decode(socket.recv_multipart()[1])
        assert "no-model" in message.error


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
