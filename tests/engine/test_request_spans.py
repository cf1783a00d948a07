"""What rank 0 tells of a request."""

from __future__ import annotations

import pytest

from pdlaunch.observe.spans import Span
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
