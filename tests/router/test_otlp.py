"""Spans of requests at a receiver that speaks OTLP over HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator

import msgspec
import pytest

from tests.router.conftest import SPEC, Stand, pair
from tests.router.otlp_collector import Collector, running_collector
from tests.router.test_life_of_a_request import chat, completion
from tests.router.test_requests import told_pair

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running_collector() as collector:
        yield collector


async def start(
    stand: Stand, collector: Collector, *, sample: float = 1.0, told: bool = True
) -> None:
    spec = msgspec.structs.replace(SPEC, otlp_endpoint=collector.url, otlp_sample=sample)
    await stand.start(told_pair() if told else pair(ours=False), spec=spec)


async def test_a_request_is_one_trace_over_all_processes(
    stand: Stand, collector: Collector
) -> None:
    await start(stand, collector)
    headers = {"traceparent": PARENT, "tracestate": "x=y", "X-Request-Id": "r1"}
    answer = await stand.post(chat(stream=True), path="/v1/chat/completions", headers=headers)
    assert answer.status == 200
    await stand.router.history.close()
    assert collector.paths == {"/v1/traces"}
    root = collector.named("chat")
    assert (root.trace_id, root.parent) == (PARENT.split("-")[1], PARENT.split("-")[2])
    assert {span.trace_id for span in collector.spans} == {root.trace_id}
    assert {span.service for span in collector.spans} == {"pdlaunch"}
    assert {span.process for span in collector.spans} == {"router", "prefill-0", "decode-0"}
    legs = {name: collector.named(f"{name} at {name}-0") for name in ("prefill", "decode")}
    assert {leg.parent for leg in legs.values()} == {root.id}
    pull = collector.named("pull")
    assert (pull.parent, pull.process) == (legs["decode"].id, "decode-0")
    assert pull.attributes["bytes"] == 4_000_000
    assert pull.attributes["verified"] is True
    assert pull.seconds == pytest.approx(0.002, abs=1e-4)
    assert "first token" in root.events
    assert legs["decode"].events["seated"]["remote_tokens"] == 30
    for engine in stand.engines.values():
        (seen,) = engine.seen
        # Engines that trace by themselves become children of the router's span.
        assert seen.headers["traceparent"] == f"00-{root.trace_id}-{root.id}-01"
        assert seen.headers["tracestate"] == "x=y"


async def test_the_share_that_is_wanted_is_sent(stand: Stand, collector: Collector) -> None:
    """A client that has decided for its trace has decided for ours."""
    await start(stand, collector, sample=0.0)
    await stand.post(completion())
    await stand.post(completion(), headers={"traceparent": PARENT, "X-Request-Id": "wanted"})
    await stand.post(completion(), headers={"traceparent": UNSAMPLED})
    await stand.router.history.close()
    roots = [span for span in collector.spans if "http.request.method" in span.attributes]
    assert [span.attributes["pdlaunch.request_id"] for span in roots] == ["wanted"]


async def test_a_collector_that_is_away_costs_no_answer(
    stand: Stand, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.CRITICAL, "opentelemetry")
    monkeypatch.setattr("pdlaunch.router.otlp._SEND_TIMEOUT_S", 0.5)
    spec = msgspec.structs.replace(SPEC, otlp_endpoint="http://127.0.0.1:9")
    await stand.start(pair(), spec=spec)
    assert (await stand.post(completion())).status == 200
    async with asyncio.timeout(30):
        await stand.router.history.close()
    # Its retries draw random numbers, which the next test may want for itself.
    for thread in threading.enumerate():
        if thread.name.lower().startswith("otel") or thread.name == "otlp-end":
            await asyncio.to_thread(thread.join, 30)
            assert not thread.is_alive(), thread.name
