"""What a server tells a router that asks for spans, and nobody else."""

from __future__ import annotations

import msgspec
import pytest

from pdlaunch.http.headers import SPANS_HEADER
from pdlaunch.observe.spans import Span, SpanReport
from pdlaunch.protocol.engine import AddRequest, RequestFinished, Tokens
from tests.engine.server.conftest import Engine
from tests.engine.server.fake_rank import FakeRank

ASKED = {SPANS_HEADER: "1"}


def says_spans(rank: FakeRank) -> None:
    """The rank tells of a pull with its first token, and of its end."""
    plain = rank.script

    def script(request: AddRequest):
        is_first = True
        for item in plain(request):
            spans = [Span("pull", 0.0, 0.0, {"bytes": 5}, "rank-0")] if is_first else []
            if isinstance(item, RequestFinished):
                spans.append(Span("end", 0.0, 0.0, {}, "rank-0"))
            if spans and isinstance(item, Tokens | RequestFinished):
                item = msgspec.structs.replace(item, spans=SpanReport(elapsed_s=0.0, spans=spans))
            is_first = False
            yield item

    rank.script = script


def by_process(told: object) -> dict[str, list[str]]:
    report = msgspec.convert(told, SpanReport)
    found: dict[str, list[str]] = {}
    for span in report.spans:
        assert -1e-6 <= span.start_at <= span.end_at <= report.elapsed_s + 1e-6
        found.setdefault(span.process, []).append(span.name)
    return found


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_an_answer_tells_of_server_and_rank(
    engine: Engine, rank: FakeRank, path: str
) -> None:
    says_spans(rank)
    body = {"prompt": "hello", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    del body["messages" if path == "/v1/completions" else "prompt"]
    status, answer, _ = await engine.post(path, body, **ASKED)
    assert status == 200
    assert by_process(answer["pdlaunch"]) == {
        "": ["receive", "tokenize"],
        "rank-0": ["pull", "end"],
    }
    assert all(request.records_spans for request in rank.added())


async def test_a_stream_tells_them_before_its_end(engine: Engine, rank: FakeRank) -> None:
    says_spans(rank)
    engine.session.headers.update(ASKED)
    *_, told, done = await engine.stream(max_tokens=3, stream_options={"include_usage": True})
    assert done == {"done": True}
    assert told["choices"] == []
    assert by_process(told["pdlaunch"])["rank-0"] == ["pull", "end"]


async def test_several_choices_are_told_apart(engine: Engine, rank: FakeRank) -> None:
    says_spans(rank)
    body = {"prompt": "hello", "max_tokens": 3, "n": 2}
    _, answer, _ = await engine.post("/v1/completions", body, **ASKED)
    spans = answer["pdlaunch"]["spans"]
    assert [span["attributes"]["choice"] for span in spans if span["name"] == "pull"] == [0, 1]


async def test_other_callers_are_told_nothing(engine: Engine, rank: FakeRank) -> None:
    answer = await engine.complete(max_tokens=3)
    assert "pdlaunch" not in answer
    assert all("pdlaunch" not in chunk for chunk in await engine.stream(max_tokens=3))
    assert not any(request.records_spans for request in rank.added())
