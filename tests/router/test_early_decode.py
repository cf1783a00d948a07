"""Decode engines that are told of a prompt while prefill computes it."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest

from pdlaunch.router.client_request import REMOTE_DECODE
from pdlaunch.router.policy import MAX_QUEUED
from tests.router.conftest import Answer, Stand, pair, pairs
from tests.router.fake_engine import FakeEngine, until
from tests.router.fake_generation import expected_tokens
from tests.router.test_disconnects import all_is_quiet, send
from tests.router.test_life_of_a_request import CHAT, MESSAGES, chat, completion, expected_text
from tests.router.test_requests import told_pair


def lend(engines: list[FakeEngine]) -> list[FakeEngine]:
    """All of them can wait for leases of the prefill engines."""
    for engine in engines:
        engine.lenders = [lender for lender in engines if lender.role == "prefill"]
    return engines


async def let_go_once_told(prefill: FakeEngine, decode: FakeEngine) -> None:
    await decode.asked_to_wait.wait()
    prefill.go.set()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
async def test_decode_knows_of_the_prompt_before_prefill_answers(
    stand: Stand, stream: bool, path: str
) -> None:
    prefill, decode = lend(pair())
    prefill.hold_prefill = True
    await stand.start([prefill, decode])
    stand.state.spawn(let_go_once_told(prefill, decode))
    answer = await stand.post(
        chat(stream=stream) if path == CHAT else completion(stream=stream), path=path
    )
    assert answer.texts() == {0: expected_text(MESSAGES if path == CHAT else "hello", 6)}
    (told,) = decode.seen
    (asked,) = prefill.seen
    lease_id = asked.body["kv_transfer_params"].pop("pdlaunch")["lease_id"]
    assert asked.body["kv_transfer_params"] == REMOTE_DECODE
    params = told.body["kv_transfer_params"]
    assert params["remote_request_id"] == lease_id
    assert (params["remote_engine_id"], params["remote_host"], params["remote_port"]) == (
        "id-of-prefill-0",
        "127.0.0.1",
        1,
    )
    assert params["pdlaunch"]["awaits_lease"] is True
    assert prefill.released == []
    await stand.state.settled()
    assert all(
        engine.num_prompt_tokens == engine.num_streams == engine.num_works == 0
        for engine in stand.pool.engines
    )
    assert stand.metric('pdlaunch_router_early_decodes_total{outcome="used"}') == 1


@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_what_decode_has_against_it_is_as_if_it_had_not_been_told(
    stand: Stand, status: int
) -> None:
    prefill, decode = lend(pair())
    decode.wait_status = status
    await stand.start([prefill, decode])
    answer = await stand.post(completion(stream=True))
    assert answer.texts() == {0: expected_text("hello", 6)}
    _, usual = decode.seen
    assert usual.body["kv_transfer_params"]["pdlaunch"]["first_token_sent"] is True
    assert (
        stand.metric("pdlaunch_router_engine_failures_total")
        == stand.metric("pdlaunch_router_retries_total")
        == 0
    )
    assert stand.metric('pdlaunch_router_early_decodes_total{outcome="dropped"}') == 1


@pytest.mark.parametrize("num_queued", [MAX_QUEUED, MAX_QUEUED + 1])
async def test_nobody_waits_behind_a_long_queue_of_prompts(stand: Stand, num_queued: int) -> None:
    engines = lend(pair())
    await stand.start(engines)
    busy = next(engine for engine in stand.pool.engines if engine.role == "prefill")
    with contextlib.ExitStack() as stack:
        for _ in range(num_queued):
            stack.enter_context(busy.working(num_prompt_tokens=1))
        answer = await stand.post(completion())
    assert answer.texts() == {0: expected_text("hello", 6)}
    params = engines[1].seen[0].body["kv_transfer_params"]["pdlaunch"]
    assert params.get("awaits_lease", False) is (num_queued == MAX_QUEUED)


async def test_an_answer_that_ends_with_prefill_needs_decode_no_more(stand: Stand) -> None:
    prefill, decode = lend(pair())
    prefill.ends = {0: 1}
    prefill.hold_prefill = True
    await stand.start([prefill, decode])
    stand.state.spawn(let_go_once_told(prefill, decode))
    answer = await stand.post(completion(stream=True))
    assert answer.finish_reasons() == {0: ["stop"]}
    await decode.aborted.wait()
    assert len(decode.seen) == 1


async def test_another_prefill_engine_means_another_lease(stand: Stand) -> None:
    engines = lend(pairs(2))
    engines[0].die_after = 0
    await stand.start(engines)
    answer = await stand.post(completion())
    assert answer.texts() == {0: expected_text("hello", 6)}
    asked = [
        engine.seen[0].body["kv_transfer_params"]["pdlaunch"]["lease_id"] for engine in engines[:2]
    ]
    assert len(set(asked)) == 2
    await stand.state.settled()
    assert sum(engine.num_streams for engine in stand.pool.engines) == 0


async def test_a_stream_that_breaks_goes_on_elsewhere(stand: Stand) -> None:
    engines = lend(pairs(2))
    await stand.start(engines)
    stand.die_after(stand.engines["decode-0"], 2, num_told=3)
    answer = await stand.post(completion(stream=True))
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert stand.metric("pdlaunch_router_migrations_total") == 1


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]]], ids=["ids", "batch of one"])
async def test_the_first_token_is_told_before_its_lease_is_there(
    stand: Stand, prompt: list[Any]
) -> None:
    prefill, decode = lend(pair())
    prefill.hold_lease = True
    await stand.start([prefill, decode])
    async with stand.session.post(
        "/v1/completions", json=completion(stream=True, prompt=prompt, return_token_ids=True)
    ) as response:
        first = msgspec.json.decode((await response.content.readuntil(b"\n\n"))[6:])
        assert not prefill.leases
        prefill.go.set()
        rest = Answer(200, response.headers, await response.read())
    (choice,) = first["choices"]
    assert choice["prompt_token_ids"] == [5, 6, 7]
    tokens = expected_tokens([5, 6, 7], 7, 0, 6)
    assert choice["token_ids"] == tokens[:1]
    said = [
        token_id
        for event in rest.events()
        for choice in event["choices"]
        for token_id in choice["token_ids"]
    ]
    assert said == tokens[1:]
    assert not any(
        "prompt_token_ids" in choice for event in rest.events() for choice in event["choices"]
    )


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
async def test_a_prefill_engine_that_dies_after_its_first_token_is_missed_by_nobody(
    stand: Stand, path: str
) -> None:
    prefill, decode = lend(pair())
    stand.die_after(prefill, 1, num_told=1)
    await stand.start([prefill, decode])
    answer = await stand.post(
        chat(stream=True) if path == CHAT else completion(stream=True), path=path
    )
    prompt: object = MESSAGES if path == CHAT else "hello"
    assert answer.texts() == {0: expected_text(prompt, 6)}
    first = expected_tokens(prompt, 7, 0, 1)[0]
    assert decode.seen[-1].body["resume"] == {"choices": [[{"token_id": first}]], "sent": True}
    assert len(prefill.seen) == 1


async def test_a_context_that_decode_does_not_have_is_refused_before_anything_is_told(
    stand: Stand,
) -> None:
    await stand.start(lend(pair()))
    answer = await stand.post(completion(stream=True, max_tokens=4096))
    assert (answer.status, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_clients_that_leave_meanwhile(stand: Stand) -> None:
    prefill, decode = lend(pair())
    prefill.hold_prefill = True
    await stand.start([prefill, decode])
    _, writer = await send(stand, completion(stream=True))
    await decode.asked_to_wait.wait()
    writer.close()
    await decode.aborted.wait()
    await prefill.aborted.wait()
    await all_is_quiet(stand)
    assert len(prefill.released) == 1


@pytest.mark.parametrize("fields", [{"n": 2}, {"max_tokens": 1}])
async def test_who_is_not_told(stand: Stand, fields: dict[str, Any]) -> None:
    prefill, decode = lend(pair())
    await stand.start([prefill, decode])
    answer = await stand.post(completion(**fields))
    assert answer.status == 200
    assert not decode.asked_to_wait.is_set()


async def test_engines_tell_of_a_stream_whose_client_left(stand: Stand) -> None:
    prefill, decode = lend(told_pair())
    prefill.hold_prefill, decode.hold_after = True, 2
    await stand.start([prefill, decode])
    stand.state.spawn(let_go_once_told(prefill, decode))
    _, writer = await send(stand, completion(stream=True))
    await decode.holding.wait()
    (record,) = stand.router.book.chosen("last", 1)
    await until(lambda: (record.summary().output_tokens or 0) > 1)
    (told,) = decode.seen
    assert told.headers["X-Request-Id"].endswith("-early")
    decode.unsent = {told.headers["X-Request-Id"]: decode.report}
    writer.close()
    await decode.aborted.wait()
    await until(lambda: stand.router.book.chosen("failed", 1))
    await stand.router.book.close()
    assert {span.process for span in record.trace().spans} == {"router", "prefill-0", "decode-0"}
    await all_is_quiet(stand)
