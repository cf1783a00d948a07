"""Two state, one answer: what clients see and what engines are asked, with engines that follow the
protocol.
"""

from collections.abc import Callable
from typing import Any

import pytest

from pdlaunch.http.headers import ROUTE_HEADER, WANTS_PAIR
from tests.router.conftest import Stand, pair, pairs
from tests.router.fake_engine import expected_tokens, text_of, until

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello there"}]


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello", "max_tokens": 6, "seed": 7} | fields


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "seed": 7} | fields


def expected_text(prompt: object, num_tokens: int, *, seed: int = 7, choice: int = 0) -> str:
    return text_of(expected_tokens(prompt, seed, choice, num_tokens))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize("n", [1, 3])
async def test_answers_hold_every_token_once(
    stand: Stand, stream: bool, make: Callable[..., dict[str, Any]], n: int
) -> None:
    await stand.start_pair()
    answer = await stand.post(make(n=n, stream=stream))
    assert answer.status == 200
    prompt = make().get("messages", "hello")
    assert answer.texts() == {
        choice: expected_text(prompt, 6, choice=choice) for choice in range(n)
    }
    if stream:
        assert answer.finish_reasons() == {choice: ["length"] for choice in range(n)}


async def test_ids_are_the_routers_own_and_do_not_change(stand: Stand) -> None:
    await stand.start_pair()
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    headers = {"X-Request-Id": "my-id", "traceparent": trace, "tracestate": "a=b"}
    answer = await stand.post(completion(stream=True), headers=headers)
    assert answer.headers["X-Request-Id"] == "my-id"
    assert {(event["id"], event["model"], event["object"]) for event in answer.events()} == {
        ("cmpl-my-id", "tiny", "text_completion")
    }
    assert len({event["created"] for event in answer.events()}) == 1
    ids = set()
    for engine in stand.engines.values():
        (seen,) = engine.seen
        assert (seen.headers["traceparent"], seen.headers["tracestate"]) == (trace, "a=b")
        ids.add(seen.headers["X-Request-Id"])
    (engine_id,) = ids
    assert engine_id.startswith("my-id-")


async def test_usage_counts_both_hops_and_the_first_engines_cache(stand: Stand) -> None:
    await stand.start_pair()
    expected = {
        "prompt_tokens": 5,
        "completion_tokens": 12,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    whole = await stand.post(completion(n=2))
    assert whole.json()["usage"] == expected
    options = {"stream_options": {"include_usage": True}, "min_tokens": 3}
    events = (await stand.post(completion(n=2, stream=True, **options))).events()
    # With one token alone, prefill would take an end token that must not come yet.
    assert stand.engines["prefill-0"].seen[-1].body["min_tokens"] == 3
    assert events[-1]["usage"] == expected
    assert events[-1]["choices"] == []
    assert all(event["usage"] is None for event in events[:-1])
    without = await stand.post(completion(stream=True))
    assert all("usage" not in event for event in without.events())


@pytest.mark.parametrize("stream", [True, False])
async def test_a_first_token_that_ends_everything_needs_no_decode(
    stand: Stand, stream: bool
) -> None:
    prefill, decode = await stand.start_pair()
    prefill.ends = {0: 1, 1: 1}
    answer = await stand.post(completion(n=2, stream=stream))
    assert answer.texts() in ({0: "", 1: ""}, {})
    if stream:
        assert answer.finish_reasons() == {0: ["stop"], 1: ["stop"]}
    else:
        assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["stop", "stop"]
        assert answer.json()["usage"]["completion_tokens"] == 2
    assert not decode.seen
    assert not prefill.released


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompts", [["a", "b", "c"], [[1, 2], [3, 4, 5]], ["same", "same"]])
async def test_lists_of_prompts_are_one_answer(
    stand: Stand, prompts: list[Any], stream: bool
) -> None:
    await stand.start(pairs(2))
    answer = await stand.post(completion(prompt=prompts, n=2, stream=stream))
    assert answer.texts() == {
        number * 2 + choice: expected_text(prompt, 6, choice=choice)
        for number, prompt in enumerate(prompts)
        for choice in (0, 1)
    }
    if not stream:
        assert [choice["index"] for choice in answer.json()["choices"]] == list(
            range(2 * len(prompts))
        )
        assert answer.json()["usage"]["completion_tokens"] == 12 * len(prompts)
        assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, prompts))
    ids = {
        seen.headers["X-Request-Id"] for engine in stand.engines.values() for seen in engine.seen
    }
    assert len(ids) == len(prompts)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_short_prompt_is_computed_where_it_is_decoded(stand: Stand, stream: bool) -> None:
    """On devices of their own; a client may ask for a pair."""
    engines = pair()
    for engine in engines:
        engine.devices = ("cpu",)
    await stand.start(engines)
    for one in stand.pool.engines:
        one.computed_tokens, one.computing_s = 50_000.0, 1.0
    prefill, decode = engines
    answer = await stand.post(completion(stream=stream))
    assert answer.texts() == {0: expected_text("hello", 6)}
    why = '; kind=decode; reason="little is left to compute"'
    assert answer.headers[ROUTE_HEADER] == f"decode-0{why}"
    assert (len(prefill.seen), len(decode.seen)) == (0, 1)
    answer = await stand.post(completion(stream=stream), headers={ROUTE_HEADER: WANTS_PAIR})
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert answer.headers[ROUTE_HEADER].startswith("prefill-0->decode-0; kind=pair; ")
    assert stand.metric('pdlaunch_router_routes_total{kind="pair"}') == 1
    for one in stand.pool.engines:
        assert (one.num_outstanding, one.num_streams, one.kv_tokens) == (0, 0, 0)
        assert one.unanswered_tokens == 0
        assert one.tokens_per_s > 0


async def test_too_long_requests_are_refused_before_anything_is_streamed(stand: Stand) -> None:
    prefill, decode = pair()
    decode.max_model_len = 20
    await stand.start([prefill, decode])
    answer = await stand.post(completion(stream=True, max_tokens=16))
    assert answer.status == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "5 tokens" in error["message"]
    assert "20 tokens" in error["message"]
    await until(lambda: prefill.released)
    assert not prefill.leases
