"""Transfer events of all ranks become one each."""

from __future__ import annotations

import itertools

import pytest

from pdlaunch.engine.channels import EventMerger
from pdlaunch.engine.request import Phase, RequestSpans
from pdlaunch.observe.spans import Span, SpanReport
from pdlaunch.protocol.transfer import LeaseEnded, PullDrained, PullFinished, TransferEvent


def merge(tp_size: int, events: list[TransferEvent]) -> list[TransferEvent]:
    merger = EventMerger(tp_size)
    merged = [merger.add(event) for event in events]
    return [event for event in merged if event is not None]


def test_one_rank_passes_events_through() -> None:
    events: list[TransferEvent] = [
        PullFinished(pull_id="a", ok=False, in_flight=True, error="x", late=True, num_retries=2),
        PullDrained(pull_id="a"),
        LeaseEnded(lease_id="r", reason="pulled"),
    ]
    assert merge(1, events) == events


def test_a_pull_is_right_only_if_every_rank_says_so() -> None:
    good = PullFinished(pull_id="a", ok=True, num_bytes=3, seconds=2.0, prefill="p", path="x")
    bad = PullFinished(pull_id="a", ok=False, error="late", seconds=1.0, late=True, path="y")
    assert merge(2, [good, bad]) == [
        PullFinished(
            pull_id="a",
            ok=False,
            error="late",
            num_bytes=3,
            seconds=2.0,
            prefill="p",
            path="x + y",
            late=True,
        )
    ]


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


def test_the_spans_of_all_ranks_come_together() -> None:
    now = [100.0]
    spans = RequestSpans(lambda: now[0])
    spans.enter(Phase.PULLING)
    reports = {
        rank: SpanReport(elapsed_s=1.0, spans=[Span("read", 0.25, 0.75)]) for rank in range(2)
    }
    (event,) = merge(
        2,
        [
            PullFinished(
                pull_id="p",
                ok=True,
                num_bytes=10**9,
                read_s=0.5,
                seconds=0.75,
                reports={rank: report},
            )
            for rank, report in reports.items()
        ],
    )
    now[0] = 101.0
    assert isinstance(event, PullFinished)
    spans.pulled(event, num_tokens=4, verifies=False)
    told = spans.report()
    assert told is not None
    assert [(span.process, span.name, span.start_at, span.end_at) for span in told.spans[1:5]] == [
        ("rank-0", "lease", 0.0, 0.25),
        ("rank-0", "pull", 0.25, 1.0),
        ("rank-0", "read", 0.25, 0.75),
        ("rank-1", "read", 0.25, 0.75),
    ]
    pull = told.spans[2]
    assert (pull.attributes["gb_s"], pull.attributes["verified"]) == (4.0, False)
