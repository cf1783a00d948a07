import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.observe.spans import MAX_SPANS, SpanLog
from tests.clock import FakeClock

_SECONDS = st.floats(0, 1000)


@given(there=_SECONDS, out_s=_SECONDS, work_s=_SECONDS, back_s=_SECONDS, offset_s=_SECONDS)
def test_a_report_is_placed_as_well_as_the_way_is_even(there, out_s, work_s, back_s, offset_s):
    """However far the clocks are apart, places are wrong by the stated error at most."""
    clock = FakeClock(offset_s)
    log = SpanLog(clock)
    clock.now += work_s
    log.add("work", offset_s)
    sent_at, received_at = there, there + out_s + work_s + back_s
    (span,) = log.report().placed(sent_at, received_at, "engine")
    error_s = log.report().clock_error_s(sent_at, received_at)
    assert span.process == "engine"
    assert span.duration_s == pytest.approx(work_s, abs=1e-6)
    assert abs(span.start_at - (sent_at + out_s)) <= error_s + 1e-6
    assert span.start_at >= sent_at - 1e-6
    assert span.end_at <= received_at + 1e-6


def test_spans_are_bounded_and_the_rest_is_counted() -> None:
    log, asker = SpanLog(FakeClock(0.0)), SpanLog(FakeClock(0.0))
    for _ in range(MAX_SPANS + 3):
        log.mark("again")
    report = log.report()
    assert (len(report.spans), report.num_dropped) == (MAX_SPANS, 3)
    for _ in range(6):
        asker.take(report, sent_at=0.0, received_at=0.0)
    assert len(asker.spans) + asker.num_dropped == 6 * (MAX_SPANS + 3)
    assert len(asker.spans) <= 4 * MAX_SPANS


def test_a_block_that_raises_is_measured_too() -> None:
    clock = FakeClock(0.0)
    log = SpanLog(clock)

    def work() -> None:
        with log.measure("work", size=3) as attributes:
            attributes["seen"] = True
            clock.now = 2.0
            raise KeyError

    with pytest.raises(KeyError):
        work()
    (span,) = log.spans
    assert (span.name, span.duration_s) == ("work", 2.0)
    assert span.attributes == {"size": 3, "seen": True}
