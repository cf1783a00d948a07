"""``Idempotency-Key``: one run, one answer, however often its client asks."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import openai
import pytest

from pdlaunch.router import idempotency
from tests.http.loop_clock import pass_time
from tests.router.conftest import SPEC, Answer, Stand, pair
from tests.router.fake_engine import FakeEngine, until
from tests.router.test_life_of_a_request import CHAT, MESSAGES, completion, expected_text

KEY = {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}


def num_runs(stand: Stand) -> int:
    return sum(seen.is_prefill for seen in stand.engines["prefill-0"].seen)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
async def test_an_answer_is_repeated_as_it_was(stand: Stand, path: str, stream: bool) -> None:
    await stand.start(pair())
    body = (
        completion(stream=stream, temperature=1.0)
        if path != CHAT
        else {"messages": MESSAGES, "max_tokens": 6, "stream": stream}
    )
    first = await stand.post(body, path=path, headers=KEY)
    again = await stand.post(body, path=path, headers=KEY)
    assert (first.status, first.raw) == (again.status, again.raw) == (200, first.raw)
    assert first.texts() == again.texts() != {}
    assert first.headers["Content-Type"] == again.headers["Content-Type"]
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert num_runs(stand) == 1


async def test_nothing_changes_without_the_header(stand: Stand) -> None:
    await stand.start(pair())
    first, again = await stand.post(completion()), await stand.post(completion())
    assert first.json()["id"] != again.json()["id"]
    assert num_runs(stand) == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_who_asks_while_it_runs_is_told_the_same(stand: Stand, stream: bool) -> None:
    prefill, decode = pair()
    decode.hold_after = 2
    await stand.start([prefill, decode])
    first = asyncio.ensure_future(stand.post(completion(stream=stream), headers=KEY))
    await decode.holding.wait()
    others = [
        asyncio.ensure_future(stand.post(completion(stream=stream), headers=KEY)) for _ in range(3)
    ]
    if stream:
        # It is told at once what there is.
        async with stand.session.post(
            "/v1/completions", json=completion(stream=True), headers=KEY
        ) as early:
            assert json.loads((await early.content.readuntil(b"\n\n")).removeprefix(b"data: "))[
                "choices"
            ]
    decode.go.set()
    answers = [await first, *[await other for other in others]]
    assert {answer.raw for answer in answers} == {answers[0].raw}
    assert answers[0].texts() == {0: expected_text("hello", 6)}
    assert num_runs(stand) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_it_goes_on_when_its_client_is_gone(stand: Stand, stream: bool) -> None:
    prefill, decode = pair()
    decode.hold_after = 2
    await stand.start([prefill, decode])
    gone = asyncio.ensure_future(stand.post(completion(stream=stream), headers=KEY))
    await decode.holding.wait()
    gone.cancel()
    await until(
        lambda: (
            stand.metric('pdlaunch_router_request_errors_total{model_name="tiny",status="499"}')
            == 1
        )
    )
    decode.go.set()
    await until(lambda: not stand.router.admission.in_flight)
    assert not decode.num_aborted
    answer = await stand.post(completion(stream=stream), headers=KEY)
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert answer.headers["Idempotent-Replayed"] == "true"
    assert num_runs(stand) == 1


@pytest.mark.parametrize("other", [completion(max_tokens=5), completion() | {"user": "x"}])
@pytest.mark.parametrize("runs", [True, False])
async def test_a_key_of_another_request_is_422(
    stand: Stand, other: dict[str, Any], runs: bool
) -> None:
    prefill, decode = pair()
    decode.hold_after = 1 if runs else None
    await stand.start([prefill, decode])
    first = asyncio.ensure_future(stand.post(completion(), headers=KEY))
    await (decode.holding.wait() if runs else first)
    refused = await stand.post(other, headers=KEY)
    assert refused.status == 422
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == ("Idempotency-Key", "idempotency_key_reused")
    assert "needs a key of its own" in error["message"]
    decode.go.set()
    assert (await first).status == 200
    assert num_runs(stand) == 1


async def test_a_key_of_the_other_api_is_422(stand: Stand) -> None:
    await stand.start(pair())
    body = {"messages": MESSAGES, "prompt": "hello", "max_tokens": 4}
    assert (await stand.post(body, headers=KEY)).status == 200
    assert (await stand.post(body, path=CHAT, headers=KEY)).status == 422


async def test_a_key_belongs_to_its_api_key(stand: Stand) -> None:
    """Nobody is told the answer of somebody else, not even whether there is one."""
    await stand.start(pair())
    for owner in ("Bearer one", "Bearer two"):
        answer = await stand.post(completion(), headers=KEY | {"Authorization": owner})
        assert "Idempotent-Replayed" not in answer.headers
    assert num_runs(stand) == 2


async def test_the_api_key_is_asked_for_before_an_answer_is_repeated(stand: Stand) -> None:
    await stand.start(pair(), spec=msgspec.structs.replace(SPEC, api_key="secret"))
    right = {"Authorization": "Bearer secret"}
    assert (await stand.post(completion(), headers=KEY | right)).status == 200
    assert (await stand.post(completion(), headers=KEY)).status == 401


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_a_key_that_is_none_is_400(stand: Stand, key: str) -> None:
    await stand.start(pair())
    refused = await stand.post(completion(), headers={"Idempotency-Key": key})
    assert refused.status == 400
    assert refused.json()["error"]["code"] == "invalid_idempotency_key"
    assert f"{len(key)} characters; use 1 to 255" in refused.json()["error"]["message"]


@pytest.mark.parametrize("status", [400, 429, 503])
async def test_what_was_refused_runs_again(stand: Stand, status: int) -> None:
    prefill, decode = pair()
    prefill.status = decode.status = status
    await stand.start([prefill, decode], recovery_wait_s=0.01)
    refused = await stand.post(completion(), headers=KEY)
    assert refused.status == status
    prefill.status = decode.status = None
    stand.publish(without=["prefill-0", "decode-0"])
    stand.publish()
    answer = await stand.post(completion(), headers=KEY)
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert "Idempotent-Replayed" not in answer.headers


async def test_a_failure_is_told_to_all_who_wait_and_not_kept(stand: Stand) -> None:
    prefill, decode = pair()
    decode.hold_after = 0
    await stand.start([prefill, decode])
    waiting = [asyncio.ensure_future(stand.post(completion(), headers=KEY)) for _ in range(3)]
    await decode.holding.wait()
    (recording,) = stand.router._prompts._repeats._recordings.values()
    await until(lambda: len(recording._readers) == 3)
    pass_time(SPEC.request_timeout_s)
    answers = [await answer for answer in waiting]
    assert [(answer.status, answer.json()["error"]["code"]) for answer in answers] == [
        (503, "request_timeout")
    ] * 3
    assert num_runs(stand) == 1
    decode.hold_after = None
    assert (await stand.post(completion(), headers=KEY)).texts() == {0: expected_text("hello", 6)}


async def test_a_stream_that_broke_is_not_repeated(stand: Stand) -> None:
    prefill, decode = pair()
    decode.error_after = prefill.error_after = 2
    await stand.start([prefill, decode], recovery_wait_s=0.01)
    broken = await stand.post(completion(stream=True), headers=KEY)
    assert "error" in broken.events()[-1]
    decode.error_after = prefill.error_after = None
    whole = await stand.post(completion(stream=True), headers=KEY)
    assert whole.texts() == {0: expected_text("hello", 6)}
    assert "Idempotent-Replayed" not in whole.headers


async def test_the_official_client_asks_again_and_is_told_the_first_answer(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives up waiting, and asks again with the header that it was given."""
    # Else it waits half a second before it does so, and up to eight later on.
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)
    prefill, decode = pair()
    decode.hold_after = 1
    await stand.start([prefill, decode])
    client = openai.AsyncOpenAI(
        base_url=f"{stand.url}/v1", api_key="any", timeout=0.3, max_retries=200
    )
    async with client:
        asking = asyncio.ensure_future(
            client.completions.create(
                model="tiny", prompt="hello", max_tokens=6, temperature=0, seed=7, extra_headers=KEY
            )
        )
        given_up = 'pdlaunch_router_request_errors_total{model_name="tiny",status="499"}'
        # Seldom: to count them takes as long as the client has.
        while not stand.metric(given_up):  # noqa: ASYNC110 - it is plain state
            await asyncio.sleep(0.02)
        decode.go.set()
        answer = await asking
    assert answer.choices[0].text == expected_text("hello", 6, seed=7)
    assert num_runs(stand) == 1


async def ask(stand: Stand, key: str, **fields: Any) -> Answer:
    return await stand.post(completion(**fields), headers={"Idempotency-Key": key})


async def test_answers_are_forgotten_after_some_minutes(stand: Stand) -> None:
    await stand.start(pair())
    now_s = 0.0
    stand.router._prompts._repeats = idempotency.Repeats(lambda: now_s)
    await ask(stand, "a")
    now_s = idempotency.KEEP_S - 1
    assert (await ask(stand, "a")).headers["Idempotent-Replayed"]
    now_s += 1
    assert "Idempotent-Replayed" not in (await ask(stand, "a")).headers
    assert num_runs(stand) == 2


async def test_the_answers_least_recently_asked_for_go_first(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stand.start(pair())
    monkeypatch.setattr(idempotency, "MAX_KEPT", 2)
    for key in ("a", "b", "a", "c"):
        await ask(stand, key)
    assert (await ask(stand, "a")).headers["Idempotent-Replayed"]
    assert (await ask(stand, "c")).headers["Idempotent-Replayed"]
    assert "Idempotent-Replayed" not in (await ask(stand, "b")).headers


async def test_answers_have_a_budget_of_bytes(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stand.start(pair())
    size = len((await ask(stand, "a", stream=True)).raw)
    monkeypatch.setattr(idempotency, "MAX_BYTES", 4 * size)
    for number in range(20):
        assert (await ask(stand, str(number), stream=True)).status == 200
    repeats = stand.router._prompts._repeats
    assert (
        repeats._num_bytes
        == sum(recording.num_bytes for recording in repeats._recordings.values())
        <= 4 * size
    )
    assert "Idempotent-Replayed" not in (await ask(stand, "0", stream=True)).headers
    assert (await ask(stand, "19", stream=True)).headers["Idempotent-Replayed"]


async def test_an_answer_has_a_bounded_number_of_readers(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them may leave megabytes unread, and they cost no engine any work."""
    monkeypatch.setattr(idempotency, "MAX_READERS", 2)
    prefill, decode = pair()
    decode.hold_after = 1
    await stand.start([prefill, decode])
    readers = [asyncio.ensure_future(ask(stand, "a")) for _ in range(2)]
    await decode.holding.wait()
    (recording,) = stand.router._prompts._repeats._recordings.values()
    await until(lambda: len(recording._readers) == 2)
    refused = await ask(stand, "a")
    assert (refused.status, refused.json()["error"]["code"]) == (429, "too_many_repeats")
    assert int(refused.headers["Retry-After"]) > 0
    decode.go.set()
    assert [(await reader).status for reader in readers] == [200, 200]
    assert (await ask(stand, "a")).status == 200


async def test_a_long_answer_is_repeated_in_pieces(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "WINDOW_BYTES", 300)
    await stand.start(pair())
    first, again = (
        await ask(stand, "a", max_tokens=20, stream=True),
        await ask(stand, "a", max_tokens=20, stream=True),
    )
    assert len(first.raw) > 3000
    assert first.raw == again.raw


async def long_answer(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The engine whose answers are too long to be kept."""
    prefill, decode = pair()
    decode.padding = "x" * 10_000
    monkeypatch.setattr(idempotency, "MAX_ANSWER_BYTES", 20_000)
    monkeypatch.setattr(idempotency, "WINDOW_BYTES", 20_000)
    await stand.start([prefill, decode])
    return decode


async def test_an_answer_that_is_too_long_is_told_and_not_kept(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = await long_answer(stand, monkeypatch)
    decode.hold_after = 8
    first = asyncio.ensure_future(ask(stand, "a", max_tokens=20, stream=True))
    await decode.holding.wait()
    (recording,) = stand.router._prompts._repeats._recordings.values()
    await until(lambda: not recording.kept)
    late = await ask(stand, "a", max_tokens=20, stream=True)
    assert (late.status, late.json()["error"]["code"]) == (409, "answer_too_long_to_repeat")
    decode.go.set()
    assert len((await first).finish_reasons()[0]) == 1
    assert len((await first).raw) > 150_000
    assert stand.router._prompts._repeats._num_bytes == 0
    assert "Idempotent-Replayed" not in (await ask(stand, "a", max_tokens=20, stream=True)).headers


async def test_an_answer_that_is_too_long_ends_with_its_client(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode = await long_answer(stand, monkeypatch)
    decode.hold_after = 8
    gone = asyncio.ensure_future(ask(stand, "a", max_tokens=20, stream=True))
    await decode.holding.wait()
    gone.cancel()
    await until(
        lambda: (
            stand.metric('pdlaunch_router_request_errors_total{model_name="tiny",status="499"}')
            == 1
        )
    )
    decode.go.set()
    await until(lambda: not stand.router.admission.in_flight)
    assert "its client is gone, and the answer is too long to be kept" in caplog.text
    assert not stand.router._prompts._repeats._recordings
    assert stand.router._prompts._repeats._num_bytes == 0
