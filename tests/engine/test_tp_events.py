"""What all ranks report becomes one report each."""

import itertools

import pytest
from msgspec import structs

from pdlaunch.engine.leader import RankReports
from pdlaunch.engine.offload.planner import JobFinished
from pdlaunch.observe.spans import SpanReport
from pdlaunch.protocol.transfer import LeaseEnded, PullDrained, PullFinished, TransferEvent


def merge(tp_size: int, events: list[TransferEvent]) -> list[TransferEvent]:
    merger = RankReports(tp_size)
    merged = [merger.add(event) for event in events]
    return [event for event in merged if isinstance(event, TransferEvent)]


def test_a_pull_is_right_only_if_every_rank_says_so() -> None:
    one, both = ({"kv_late_reads": 1, "kv_pull_retries": retries} for retries in (1, 2))
    reports = {tp_rank: SpanReport(elapsed_s=1.0, spans=[]) for tp_rank in range(2)}
    good = PullFinished(
        pull_id="a", ok=True, num_bytes=3, seconds=2.0, prefill="p", path="x", counts=one
    )
    bad = PullFinished(pull_id="a", ok=False, error="late", seconds=1.0, counts=one, path="y")
    good.reports, bad.reports = {0: reports[0]}, {1: reports[1]}
    expected = structs.replace(good, ok=False, error="late", path="x + y", counts=both)
    assert merge(2, [good, bad]) == [structs.replace(expected, reports=reports)]


def test_lease_ends_when_all_ranks_said_so_and_one_expiry_is_an_expiry() -> None:
    reasons = ("pulled", "expired", "pulled")
    merged = merge(3, [LeaseEnded(lease_id="r", reason=reason) for reason in reasons])
    assert merged == [LeaseEnded(lease_id="r", reason="expired")]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_blocks_come_back_exactly_once_in_any_order(order: tuple[int, ...]) -> None:
    """Two ranks, both in flight; a drain follows its own rank's finish, but ranks overtake each
    other.
    """
    per_rank: list[list[TransferEvent]] = [
        [PullFinished(pull_id="a", ok=False, in_flight=True), PullDrained(pull_id="a")]
        for _ in range(2)
    ]
    finished, *drained = merge(2, [per_rank[index // 2].pop(0) for index in order])
    assert isinstance(finished, PullFinished)
    assert drained == ([PullDrained(pull_id="a")] if finished.in_flight else [])


def test_a_copy_has_ended_when_all_ranks_have_reported_it() -> None:
    reports = RankReports(2)
    assert reports.add(JobFinished(1, True, num_bytes=5)) is None
    assert reports.add(JobFinished(2, True, num_bytes=5)) is None
    merged = reports.add(JobFinished(1, False, "broken", [4], num_bytes=6))
    assert merged == JobFinished(1, False, "broken", [4], num_bytes=11)
