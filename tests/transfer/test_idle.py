"""A transfer thread that has nothing to do sleeps, whatever it has done before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pdlaunch.protocol.control import PairReady
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from pdlaunch.protocol.transfer import PullFinished
from tests.transfer.fakes import Fabric, FakeConnector
from tests.transfer.rank_process import grant, pull
from tests.transfer.test_thread import Rank, remote

PULLS_A_ROUND = 200
MAX_ROUNDS = 5


class CountingClock:
    """The true time. Each turn of a transfer thread asks for it."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self) -> float:
        self.num_calls += 1
        return time.monotonic()


class Pair:
    """A prefill and a decode rank that have shaken hands."""

    def __init__(self, context: SecureContext, clock: Callable[[], float]) -> None:
        fabric = Fabric()
        self.holder, self.puller = (
            Rank(context, role, FakeConnector(f"{role}-0/rank-0#1", fabric), clock=clock)
            for role in ("prefill", "decode")
        )
        self.puller.transfer.update_registry([self.holder.entry(), self.puller.entry()])
        assert isinstance(self.puller.reports.get(timeout=60), PairReady)
        self.num_pulls = 0

    def pull(self) -> None:
        self.num_pulls += 1
        lease_id = f"r{self.num_pulls}"
        self.holder.transfer.submit([grant(lease_id, [4, 5])])
        self.puller.transfer.submit([pull(f"p{self.num_pulls}", remote(lease_id), [1, 2])])
        (finished,) = self.puller.events()
        assert isinstance(finished, PullFinished)
        assert finished.ok

    def close(self) -> None:
        for rank in (self.holder, self.puller):
            rank.transfer.close(timeout_s=60)


@contextmanager
def connected_pair(clock: Callable[[], float]) -> Iterator[Pair]:
    context = SecureContext(new_launch_keys())
    pair = Pair(context, clock)
    try:
        yield pair
    finally:
        pair.close()
        context.close()


def test_idle_threads_do_not_turn_while_others_pull():
    """Two hundred pulls of another pair take longer than any pause between two looks at a READ: who
    polled would turn.
    """
    clock = CountingClock()
    with connected_pair(clock) as idle, connected_pair(time.monotonic) as busy:
        idle.pull()
        # The last pull's messages may still be on the way in the first round.
        for _ in range(MAX_ROUNDS):
            before = clock.num_calls
            for _ in range(PULLS_A_ROUND):
                busy.pull()
            if clock.num_calls == before:
                break
        else:
            raise AssertionError("the idle threads have turned in every round")
        idle.pull()
        assert clock.num_calls > before, "each turn asks the clock"
