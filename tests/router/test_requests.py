"""What the router tells of the requests that it has served: in lists, traces and a line each."""

import asyncio
import logging
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.protocol.control import Registry
from pdlaunch.protocol.status import RequestList, RequestSummary, RequestTrace
from pdlaunch.router.request_history import MAX_ENGINE_SPANS
from tests.router.conftest import Stand, client_key, pair
from tests.router.fake_engine import FakeEngine, until
from tests.router.test_life_of_a_request import completion

LOGGER = "pdlaunch.router.request_history"
SECRET = "secret words of a prompt"


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    told = [record for record in caplog.records if record.levelno == logging.INFO]
    return [record.getMessage() for record in told if record.name == LOGGER]


def report(*spans: tuple[str, float, float, dict[str, Any]], elapsed_s: float = 0.5) -> Any:
    return {
        "elapsed_s": elapsed_s,
        "spans": [
            {"name": name, "start_at": start, "end_at": end, "attributes": attributes}
            for name, start, end, attributes in spans
        ],
    }


def told_pair() -> list[FakeEngine]:
    prefill, decode = pair()
    prefill.report = report(
        ("queue", 0.0, 0.001, {}),
        ("prefill", 0.001, 0.002, {"tokens": 8}),
        ("prefill", 0.003, 0.004, {"tokens": 4}),
        ("seated", 0.0, 0.0, {"device_tokens": 16, "host_tokens": 4, "remote_tokens": 0}),
    )
    decode.report = report(
        ("queue", 0.0, 0.0005, {}),
        ("pull", 0.001, 0.003, {"bytes": 4_000_000, "gb_s": 2.5, "verified": True}),
        ("seated", 0.0, 0.0, {"device_tokens": 2, "host_tokens": 0, "remote_tokens": 30}),
    )
    return [prefill, decode]


async def listed(stand: Stand, query: str = "") -> list[RequestSummary]:
    return msgspec.convert(await stand.get(f"/pdlaunch/requests{query}"), RequestList).requests


async def trace(stand: Stand, request_id: str) -> RequestTrace:
    return msgspec.convert(await stand.get(f"/pdlaunch/requests/{request_id}"), RequestTrace)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_through_a_pair_is_told_whole(
    stand: Stand, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pdlaunch")
    await stand.start(told_pair())
    answer = await stand.post(
        completion(stream=stream, prompt=SECRET), headers={"X-Request-Id": "r/1"}
    )
    assert answer.status == 200
    assert b"elapsed_s" not in answer.raw, "the client sees what engines tell the router"
    (summary,) = await listed(stand)
    assert summary.id == "r/1"
    assert (summary.status, summary.state, summary.error) == (200, "done", None)
    assert (summary.path, summary.model) == ("/v1/completions", "tiny")
    assert (summary.prefill, summary.decode) == ("prefill-0", "decode-0")
    assert summary.route == "prefill-0->decode-0"
    assert summary.explanation
    assert (summary.cached_device_tokens, summary.cached_host_tokens) == (16, 4)
    assert summary.remote_tokens == 30
    assert summary.queue_ms == pytest.approx(1.5)
    assert summary.prefill_ms == pytest.approx(3.0)
    assert summary.pull_ms == pytest.approx(2.0)
    assert (summary.pull_mb, summary.pull_gb_s, summary.verified) == (4.0, 2.5, True)
    assert (summary.output_tokens, summary.finish_reason, summary.retries) == (6, "length", 0)
    assert summary.ms_per_token is not None
    assert 0 < summary.first_token_ms <= summary.total_ms

    (line,) = lines(caplog)
    assert line.startswith("200 /v1/completions model=tiny route=prefill-0->decode-0 ")
    assert " pull_ms=2.0 pull_mb=4.0 pull_gb_s=2.5 verified=True " in line
    assert SECRET not in caplog.text

    whole = await trace(stand, "r/1")
    assert msgspec.structs.asdict(summary).items() <= msgspec.structs.asdict(whole).items()
    names = [span.name for span in whole.spans if span.process == "prefill-0"]
    assert names == ["queue", "seated", "prefill", "prefill"]
    assert (whole.spans[0].name, whole.spans[0].end_ms) == ("request", whole.total_ms)


REFUSALS = [
    ({"max_tokens": 0}, {}, 400, "max_tokens"),
    ({"model": "other"}, {}, 404, "model_not_found"),
    ({"temperature": -1}, {}, 400, "answered 400"),
    ({}, {"Authorization": "Bearer wrong"}, 401, "invalid_api_key"),
    ({}, {"Content-Type": "text/plain"}, 415, ""),
    ({}, {"X-Request-Id": "x" * 300}, 400, "X-Request-Id"),
]


@pytest.mark.parametrize(("fields", "headers", "status", "said"), REFUSALS)
async def test_refusals_are_told(
    stand: Stand, fields: dict[str, Any], headers: dict[str, str], status: int, said: str
) -> None:
    await stand.start_pair(keys=(client_key("right"),))
    right = {"Authorization": "Bearer right"}
    answer = await stand.post(completion(**fields), headers=right | headers)
    assert answer.status == status
    async with stand.session.get("/pdlaunch/requests?failed=5", headers=right) as response:
        (summary,) = msgspec.json.decode(await response.read(), type=RequestList).requests
    assert (summary.status, summary.state) == (status, "done")
    assert said in (summary.error or "")


async def test_who_waits_for_the_start_has_not_failed(stand: Stand) -> None:
    await stand.start_pair()
    stand.state.update(Registry(version=9, entries=[], withheld="starting"))
    assert (await stand.post(completion())).status == 503
    assert not await listed(stand)


async def test_a_client_that_goes_away_is_told(stand: Stand) -> None:
    engines = told_pair()
    engines[1].hold_after = 2
    await stand.start(engines)
    headers = {"X-Request-Id": "mine"}
    asked = asyncio.ensure_future(stand.post(completion(stream=True), headers=headers))
    await engines[1].holding.wait()
    (running,) = await listed(stand)
    assert (running.state, running.status, running.decode) == ("running", None, "decode-0")
    assert running.output_tokens
    asked.cancel()
    await until(lambda: engines[1].num_aborted)
    await until(lambda: stand.router.history.chosen("failed", 1))
    (summary,) = await listed(stand)
    assert (summary.status, summary.error) == (499, "the client went away")
    # Prefill has told its part with its answer; decode tells its own at the end of a stream alone.
    spans = (await trace(stand, "mine")).spans
    assert {span.process for span in spans} == {"router", "prefill-0"}
    (cut,) = [span for span in spans if span.name == "decode at decode-0"]
    assert cut.attributes["error"] == "the client went away"


async def test_an_engine_cannot_fill_the_memory_with_spans(stand: Stand) -> None:
    engines = pair()
    engines[1].report = report(*[("decode", 0.0, 0.1, {})] * (MAX_ENGINE_SPANS + 7))
    await stand.start(engines)
    await stand.post(completion(stream=True), headers={"X-Request-Id": "r1"})
    told = await trace(stand, "r1")
    assert sum(span.process == "decode-0" for span in told.spans) == MAX_ENGINE_SPANS
    assert told.dropped_spans == 7


QUOTING = msgspec.json.encode(
    {"error": {"message": SECRET, "type": "InternalServerError", "code": SECRET}}
)


@pytest.mark.parametrize("how", ["body", "page", "redirect", "event", "malformed"])
async def test_what_an_engine_says_of_a_prompt_is_not_told(
    stand: Stand, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Engines quote prompts in their errors."""
    caplog.set_level(logging.DEBUG, "pdlaunch")
    await stand.start_pair()
    for engine in stand.engines.values():
        engine.error_body = QUOTING
        if how == "event":
            engine.error_after = 1
            engine.error_body = QUOTING.replace(b"InternalServerError", b"server_error")
        elif how == "malformed":
            engine.error_after = 1
            engine.error_body = msgspec.json.encode({"choices": [{"index": SECRET, "text": "x"}]})
        else:
            engine.status = 307 if how == "redirect" else 500
        if how == "page":
            engine.error_body = SECRET.encode()
    answer = await stand.post(completion(prompt="x", stream=how in ("event", "malformed")))
    (line,) = lines(caplog)
    assert 'error="engine_failed: engine ' in line, line
    assert "secret" not in answer.raw.decode()
    assert "secret" not in "".join(record.getMessage() for record in caplog.records)
    if how == "body":
        assert "answered 500 (InternalServerError)" in line
    for path in ("/pdlaunch/requests", "/pdlaunch/requests/" + answer.headers["X-Request-Id"]):
        async with stand.session.get(path) as response:
            assert "secret" not in await response.text()


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_no_summary_makes_a_terminal_obey(model: str, error: str, explanation: str) -> None:
    summary = RequestSummary(
        id="r", received_at=0.0, path="/", model=model, error=error, explanation=explanation
    )
    assert "\n" not in summary.line
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in summary.line)


@pytest.mark.parametrize("told", ["?", {"spans": 3}, [], {"elapsed_s": "x", "spans": []}])
async def test_a_report_that_makes_no_sense_costs_no_answer(stand: Stand, told: Any) -> None:
    engines = pair()
    for engine in engines:
        engine.report = told
    await stand.start(engines)
    assert (await stand.post(completion())).status == 200
    (summary,) = await listed(stand)
    assert summary.output_tokens == 6
