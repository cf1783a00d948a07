from __future__ import annotations

import signal
import socket

from pdlaunch.launch.events import EventQueue, SignalInbox, StopRequested, causes_first
from pdlaunch.launch.hosts.local import MessageReceived, ProcessExited
from pdlaunch.protocol.control import Failed
from tests.launch.fakes import FakeHost


def test_a_killed_rank_comes_before_its_peers_that_abort_and_those_that_complain() -> None:
    killed = ProcessExited("prefill-0/rank-1", 1, -signal.SIGKILL)
    aborted = ProcessExited("prefill-0/rank-0", 1, -signal.SIGABRT)
    complained = MessageReceived("prefill-0", Failed(error="rank 0 is gone"))
    left = ProcessExited("prefill-0", 1, 1)
    stop = StopRequested(signal.SIGINT)
    events = causes_first([stop], [left, aborted, killed], [complained])
    assert events == [stop, killed, aborted, complained, left]


def test_what_a_host_reports_and_the_end_of_the_starter_are_events() -> None:
    ours, theirs = socket.socketpair()
    host = FakeHost()
    gone = ProcessExited("router", 1, 0)
    host.exits = lambda: [gone]
    with SignalInbox() as signals, ours:
        queue = EventQueue(host, signals, lifeline=ours.fileno())
        theirs.send(b"what is written means nothing")
        assert queue.wait(20) == [gone]
        theirs.close()
        stop, same = queue.wait(20)
        reason = "the process that started this is gone"
        assert (stop, same) == (StopRequested(signal.SIGHUP, reason), gone)
        assert queue.wait(0) == [gone]
