"""Where a lease outlives its rank, the answer that speaks of it waits until every rank has written
it down.
"""

from __future__ import annotations

from typing import Any

import pytest

from pdlaunch.engine.leader import GRANT_WAIT_S, Leader
from pdlaunch.engine.tp_events import EventAggregator
from pdlaunch.protocol.engine import AddRequest, Hello, SamplingParams
from pdlaunch.protocol.transfer import (
    GrantLease,
    LeaseEnded,
    LeaseGranted,
    TransferCommand,
    TransferEvent,
)
from tests.engine.test_leader import Recorder, make_leader


class Ranks(Recorder):
    """The ranks of an engine, which report what the test says."""

    def __init__(self, *requests: Any) -> None:
        super().__init__(list(requests))
        self.now_s = 0.0
        self.events: list[TransferEvent] = []
        self.soon: list[TransferEvent] = []
        """What they report when they are waited for."""
        self.is_quick = False
        """They have written a lease down before rank 0 looks again."""

    def submit(self, commands: list[TransferCommand]) -> None:
        super().submit(commands)
        if self.is_quick:
            granted = (
                command.request_id for command in commands if isinstance(command, GrantLease)
            )
            self.events += [LeaseGranted(request_id=request_id) for request_id in granted]

    def take_events(self) -> list[TransferEvent]:
        events, self.events = self.events, []
        return events

    def wait(self, timeout_s: float) -> None:
        self.now_s += GRANT_WAIT_S / 4
        self.events, self.soon = self.events + self.soon, []

    def leader(self) -> Leader:
        return make_leader(self, clock=lambda: self.now_s, wait_for_ranks=self.wait)


def run(leader: Leader, ranks: Ranks) -> list[str]:
    """Turn until nothing is left to do; returns what was told meanwhile."""
    leader.turn()
    while leader.wait_s() == 0 or ranks.requests or ranks.events:
        leader.turn()
    told, ranks.told = ranks.told, []
    return [type(message).__name__ for message in told]


def request(name: str, *, remote: bool = True) -> AddRequest:
    sampling = SamplingParams(max_tokens=1)
    return AddRequest(
        request_id=name, prompt_token_ids=[1, 2, 3], sampling=sampling, do_remote_decode=remote
    )


@pytest.mark.parametrize(
    "event", [LeaseGranted(request_id="a/0"), LeaseEnded(request_id="a/0", reason="expired")]
)
def test_an_answer_waits_for_its_lease(event: TransferEvent) -> None:
    ranks = Ranks(request("a/0"))
    leader = ranks.leader()
    # The first token promises nothing: it leaves at once.
    assert run(leader, ranks) == ["GrantLease", "Tokens"]
    ranks.events.append(LeaseGranted(request_id="other"))
    assert run(leader, ranks) == []
    ranks.events.append(event)
    assert run(leader, ranks) == ["RequestFinished"]


def test_ranks_that_are_quicker_than_the_answer_are_heard() -> None:
    ranks = Ranks(request("a/0"))
    ranks.is_quick = True
    assert run(ranks.leader(), ranks) == ["GrantLease", "Tokens", "RequestFinished"]
    assert ranks.now_s == 0


def test_ranks_are_waited_for_a_moment_so_that_the_answer_need_not_wait_for_the_next_step() -> None:
    ranks = Ranks(request("a/0"))
    leader = ranks.leader()
    for _ in range(2):
        ranks.soon = [LeaseGranted(request_id="other"), LeaseGranted(request_id="a/0")]
        leader.turn()
    assert [type(message).__name__ for message in ranks.told] == [
        "GrantLease",
        "Tokens",
        "RequestFinished",
    ]
    assert ranks.now_s == GRANT_WAIT_S / 4


def test_ranks_are_not_waited_for_longer() -> None:
    ranks = Ranks(request("a/0"))
    leader = ranks.leader()
    for _ in range(2):
        leader.turn()
    assert [type(message).__name__ for message in ranks.told] == ["GrantLease", "Tokens"]
    assert ranks.now_s == GRANT_WAIT_S


def test_answers_without_a_lease_and_those_of_leases_that_die_with_their_rank_do_not_wait() -> None:
    ranks = Ranks(request("b/0", remote=False))
    assert run(ranks.leader(), ranks) == ["RequestFinished"]
    assert ranks.now_s == 0
    ranks = Ranks(request("a/0"))
    assert run(make_leader(ranks), ranks) == ["GrantLease", "Tokens", "RequestFinished"]


def test_a_new_server_is_not_told_of_requests_that_it_has_not_sent() -> None:
    ranks = Ranks(request("a/0"))
    leader = ranks.leader()
    assert run(leader, ranks) == ["GrantLease", "Tokens"]
    ranks.requests.append(Hello(server_incarnation=2))
    run(leader, ranks)
    ranks.events.append(LeaseGranted(request_id="a/0"))
    assert run(leader, ranks) == []


def test_a_lease_is_granted_when_all_ranks_have_written_it_down() -> None:
    ranks = EventAggregator(tp_size=3)
    granted = LeaseGranted(request_id="a")
    assert [ranks.add(granted) for _ in range(3)] == [[], [], [granted]]
    assert [ranks.add(granted) for _ in range(3)] == [[], [], [granted]]
    assert ranks.add(LeaseGranted(request_id="b")) == []
