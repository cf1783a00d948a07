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
from tests.router.test_life_of_a_request import completion
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
    await stand.start(told_pair() if told else pair(), spec=spec)


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
