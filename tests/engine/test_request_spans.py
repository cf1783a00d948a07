"""What rank 0 tells of a request."""

from __future__ import annotations

import pytest

from pdlaunch.engine.channels import EventMerger
from pdlaunch.engine.request import RequestSpans
from pdlaunch.observe.spans import Span, SpanReport
from pdlaunch.protocol.transfer import PullFinished
from tests.engine.fake_engine import PROMPT, FakeEngine, remote_kv


def names(engine: FakeEngine, name: str = "r") -> list[str]:
    return [span.name for span in engine.spans[name]]


def named(engine: FakeEngine, wanted: str, name: str = "r") -> list[Span]:
    return [span for span in engine.spans[name] if span.name == wanted]


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_chunks_the_first_decode_step_and_the_rest(runs_ahead: bool) -> None:
    engine = FakeEngine(max_num_batched_tokens=4, runs_ahead=runs_ahead)
    engine.add("r", PROMPT, 6, records_spans=True)
    engine.run()
    assert names(engine) == [
        "queue",
        "seated",
        "prefill",
        "prefill",
        "prefill",
        "first decode step",
        "decode",
        "end",
    ]
    assert [span.attributes["tokens"] for span in named(engine, "prefill")] == [4, 4, 2]
    (end,) = named(engine, "end")
    assert end.attributes == {"reason": "length", "tokens": 6}
    assert {span.process for span in engine.spans["r"]} == {"rank-0"}
    starts = [span.start_at for span in engine.spans["r"]]
    assert starts == sorted(starts)


def test_a_cached_prompt_says_where_it_was_found() -> None:
    engine = FakeEngine()
    engine.add("first", PROMPT)
    engine.run()
    engine.add("r", PROMPT, records_spans=True)
    engine.run()
    (seated,) = named(engine, "seated")
    assert seated.attributes == {"device_tokens": 8, "host_tokens": 0, "remote_tokens": 0}
    assert [span.attributes["tokens"] for span in named(engine, "prefill")] == [2]


def test_a_pull_says_what_it_brought() -> None:
    engine = FakeEngine()
    engine.add("r", PROMPT, remote_kv=remote_kv("lease", 10), output=[1], records_spans=True)
    engine.step()
    engine.end_pull(next(iter(engine.pulls)))
    engine.run()
    assert names(engine)[:5] == ["queue", "lease", "pull", "queue", "seated"]
    (pull,), (seated,) = named(engine, "pull"), named(engine, "seated")
    assert pull.attributes["verified"] is True
    assert pull.attributes["tokens"] == seated.attributes["remote_tokens"] == len(PROMPT)
    assert not named(engine, "prefill")


def test_the_reports_of_all_ranks_come_together() -> None:
    now = [100.0]
    spans = RequestSpans(True, clock=lambda: now[0])
    spans.enter("pulling")
    aggregator = EventMerger(2)
    for rank in range(2):
        report = SpanReport(elapsed_s=1.0, spans=[Span("read", 0.25, 0.75)])
        merged = aggregator.add(
            PullFinished(
                pull_id="p",
                ok=True,
                num_bytes=10**9,
                read_s=0.5,
                seconds=0.75,
                reports={rank: report},
            )
        )
    now[0] = 101.0
    (event,) = merged
    assert isinstance(event, PullFinished)
    spans.pulled(event, num_tokens=4, verifies=False)
    told = spans.end("length", 1)
    assert told is not None
    by_process = [(span.process, span.name, span.start_at, span.end_at) for span in told.spans]
    assert by_process[1:5] == [
        ("rank-0", "lease", 0.0, 0.25),
        ("rank-0", "pull", 0.25, 1.0),
        ("rank-0", "read", 0.25, 0.75),
        ("rank-1", "read", 0.25, 0.75),
    ]
    pull = told.spans[2]
    assert (pull.attributes["gb_s"], pull.attributes["verified"]) == (4.0, False)
