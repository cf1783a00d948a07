"""Events that arrive at once are ordered so that the root cause of a failure comes first."""

from __future__ import annotations

import os
import signal
import socket

from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.launch.events import EventQueue, SignalInbox, StopRequested, causes_first
from pdlaunch.launch.hosts.host import MessageReceived, ProcessExited
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


@given(st.lists(st.integers(-20, 3), max_size=8), st.integers(0, 3))
def test_no_event_is_lost_and_equal_ones_keep_their_order(
    returncodes: list[int], num_messages: int
) -> None:
    exits = [ProcessExited(f"p{index}", 1, code) for index, code in enumerate(returncodes)]
    messages = [MessageReceived(f"m{index}", Failed(error="")) for index in range(num_messages)]
    events = causes_first([], exits, messages)
    assert len(events) == len(exits) + len(messages)
    assert [event for event in events if event in messages] == messages
    for returncode in returncodes:
        same = [gone for gone in exits if gone.returncode == returncode]
        assert [event for event in events if event in same] == same


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
        assert (stop, same) == (StopRequested(signal.SIGHUP, "whoever started this is gone"), gone)
        assert queue.wait(0) == [gone]


def test_a_stop_signal_ends_the_wait() -> None:
    with SignalInbox() as signals:
        queue = EventQueue(FakeHost(), signals)
        os.kill(os.getpid(), signal.SIGTERM)
        assert queue.wait(20) == [StopRequested(signal.SIGTERM)]
