from __future__ import annotations

import itertools

import pytest

from pdlaunch.engine.channels import EventMerger
from pdlaunch.protocol.transfer import LeaseEnded, PullDrained, PullFinished, TransferEvent


def run(tp_size: int, events: list[TransferEvent]) -> list[TransferEvent]:
    aggregator = EventMerger(tp_size)
    return [merged for event in events for merged in aggregator.add(event)]


def test_one_rank_passes_events_through() -> None:
    events: list[TransferEvent] = [
        PullFinished(pull_id="a", ok=False, in_flight=True, error="x"),
        PullDrained(pull_id="a"),
        LeaseEnded(lease_id="r", reason="pulled"),
    ]
    assert run(1, events) == events


def test_a_pull_is_right_only_if_every_rank_says_so() -> None:
    merged = run(
        2,
        [
            PullFinished(pull_id="a", ok=True, num_bytes=3),
            PullFinished(pull_id="a", ok=False, error="late"),
        ],
    )
    assert [(event.ok, event.error, event.num_bytes) for event in merged] == [(False, "late", 3)]  # type: ignore[union-attr]


def test_lease_ends_when_all_ranks_said_so_and_one_expiry_is_an_expiry() -> None:
    merged = run(
        3, [LeaseEnded(lease_id="r", reason=reason) for reason in ("pulled", "expired", "pulled")]
    )
    assert merged == [LeaseEnded(lease_id="r", reason="expired")]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_blocks_come_back_exactly_once_in_any_order(order: tuple[int, ...]) -> None:
    """Two ranks, both in flight; a drain follows its own rank's finish, but ranks overtake each
    other.
    """
    per_rank = [
        [PullFinished(pull_id="a", ok=False, in_flight=True), PullDrained(pull_id="a")]
        for _ in range(2)
    ]
    events = [per_rank[index // 2].pop(0) for index in order]
    merged = run(2, events)
    finished = [event for event in merged if isinstance(event, PullFinished)]
    drained = [event for event in merged if isinstance(event, PullDrained)]
    assert len(finished) == 1
    assert finished[0].in_flight == bool(drained)
    assert len(drained) <= 1
    assert merged[-1] is (drained[0] if drained else finished[0])
