"""A router in front of engines that tell their costs."""

from __future__ import annotations

import logging
import re

import msgspec
import pytest

from pdlaunch.observe.online_fit import OnlineFit
from pdlaunch.protocol.costs import ROUTE_HEADER, WANTS_PAIR
from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.router.engine import EXPERIENCE_DOUBT
from pdlaunch.router.main import new_policy
from tests.router.conftest import SPEC, Stand, pair
from tests.router.fake_engine import FakeEngine
from tests.router.fake_generation import expected_tokens
from tests.router.test_cost_model import costs
from tests.router.test_life_of_a_request import chat, completion, expected_text
from tests.router.test_request_lines import lines


def costed_pair() -> list[FakeEngine]:
    engines = pair()
    for engine in engines:
        engine.costs = costs(engine.role)
    return engines


def load_decode(stand: Stand, num_streams: int = 40) -> None:
    """Give the decode engine streams, which a prompt would delay."""
    for engine in stand.pool.engines:
        if engine.role == "decode":
            engine.num_streams, engine.context_tokens = num_streams, 512 * num_streams


def load_prefill(stand: Stand, num_tokens: int = 1_000_000) -> None:
    for engine in stand.pool.engines:
        if engine.role == "prefill":
            engine.unanswered_tokens, engine.progressed_at = num_tokens, stand.pool.clock()


def forget_times(stand: Stand) -> None:
    """Go by the costs that engines tell: the fakes answer sooner, which says nothing of routes."""
    for engine in stand.pool.engines:
        engine.experience = OnlineFit((0.0, 1.0), EXPERIENCE_DOUBT)


@pytest.mark.parametrize("stream", [True, False])
async def test_decode_computes_the_prompt_while_prefill_is_busy(stand: Stand, stream: bool) -> None:
    prefill, decode = costed_pair()
    await stand.start([prefill, decode])
    load_prefill(stand)
    answer = await stand.post(completion(stream=stream))
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert prefill.seen == []
    (seen,) = decode.seen
    assert "kv_transfer_params" not in seen.body
    assert answer.headers[ROUTE_HEADER].startswith("decode-0; kind=decode; ttft_ms=")
    assert stand.metric('pdlaunch_router_routes_total{kind="decode"}') == 1
    assert stand.metric('pdlaunch_router_estimate_relative_error_count{kind="decode"}') == 1
    assert stand.metric("pdlaunch_router_fallbacks_total") == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_pair_serves_while_decode_has_streams(stand: Stand, stream: bool) -> None:
    prefill, decode = costed_pair()
    await stand.start([prefill, decode])
    load_decode(stand)
    answer = await stand.post(chat(stream=stream), path="/v1/chat/completions")
    assert answer.status == 200
    assert (len(prefill.seen), len(decode.seen)) == (1, 1)
    assert answer.headers[ROUTE_HEADER].startswith("prefill-0->decode-0; kind=pair; ttft_ms=")
    assert stand.metric('pdlaunch_router_routes_total{kind="pair"}') == 1
    # What engines tell routers is not for clients.
    assert b"pdlaunch_work" not in answer.raw
    heard = {engine.name for engine in stand.pool.engines if engine.report is not None}
    assert heard == {"prefill-0", "decode-0"}


async def test_header_and_line_say_route_alternatives_and_estimates(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pdlaunch")
    await stand.start(costed_pair())
    load_decode(stand)
    answer = await stand.post(completion())
    number = r"=\d+\.\d"
    names = [rf"{name}{number}" for name in ("ttft_ms", "itl_ms", "total_ms", "delay_ms")]
    other = " ".join(names)
    assert re.fullmatch(
        rf"prefill-0->decode-0; kind=pair; {'; '.join(names)}; "
        rf'else="decode-0 {other}, prefill-0 {other}"',
        answer.headers[ROUTE_HEADER],
    )
    (line,) = lines(caplog)
    estimate = r"first token [\d.]+ ms, all \d+ ms, others \+[\d.]+ ms"
    assert re.search(
        rf"why: least cost: prefill-0->decode-0 {estimate}, "
        rf"else decode-0 {estimate}, else prefill-0 {estimate}",
        line,
    )


async def test_who_looks_at_pairs_gets_a_pair(stand: Stand) -> None:
    prefill, decode = costed_pair()
    await stand.start([prefill, decode])
    load_prefill(stand, 100_000)
    answer = await stand.post(completion(), headers={ROUTE_HEADER: WANTS_PAIR})
    assert (len(prefill.seen), len(decode.seen)) == (1, 1)
    assert "kind=least_work" in answer.headers[ROUTE_HEADER]
    await stand.post(completion(), headers={ROUTE_HEADER: "anything else"})
    assert len(prefill.seen) == 1


def test_the_settings_choose_the_policy() -> None:
    by_pairs = new_policy(msgspec.structs.replace(SPEC, by_cost=False))
    assert isinstance(by_pairs, LeastCost)
    assert by_pairs.prefers_pairs
    limited = new_policy(msgspec.structs.replace(SPEC, max_ttft_ms=50.0, max_itl_ms=8.0))
    assert isinstance(limited, LeastCost)
    assert not limited.prefers_pairs
    assert (limited._max_ttft_s, limited._max_itl_s) == (0.05, 0.008)


async def test_nothing_is_left_counted_after_answers_errors_and_retries(stand: Stand) -> None:
    prefill, decode = costed_pair()
    await stand.start([prefill, decode])
    await stand.post(completion(stream=True))
    decode.status = 500
    await stand.post(completion(stream=True))
    decode.status = None
    prefill.die_after = 0
    load_prefill(stand, 0)
    await stand.post(completion(temperature=-1.0))
    await stand.state.settled()
    for engine in stand.pool.engines:
        assert (engine.unanswered_tokens, engine.context_tokens, engine.num_streams) == (0, 0, 0)
        assert (engine.num_expected, engine.expected_tokens) == (0, 0)


async def test_an_engine_that_fails_the_prompt_alone_leaves_it_to_others(stand: Stand) -> None:
    prefill, decode = costed_pair()
    decode.status = 503
    await stand.start([prefill, decode])
    load_prefill(stand)
    answer = await stand.post(completion(stream=True))
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert len(prefill.seen) == 1


async def test_a_stream_that_breaks_at_an_engine_alone_goes_on_elsewhere(stand: Stand) -> None:
    prefill, decode = costed_pair()
    await stand.start([prefill, decode])
    load_prefill(stand)
    stand.die_after(decode, 2, num_told=2)
    answer = await stand.post(completion(stream=True))
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert prefill.seen[-1].body["resume"]["choices"] == [
        [{"token_id": token} for token in expected_tokens("hello", 7, 0, 2)]
    ]


async def test_engines_without_costs_have_a_route_in_the_header_too(stand: Stand) -> None:
    await stand.start(pair())
    for max_tokens, engines in ((1, "prefill-0"), (6, "prefill-0->decode-0")):
        answer = await stand.post(completion(max_tokens=max_tokens))
        assert answer.headers[ROUTE_HEADER] == f"{engines}; kind=least_work"
    # Here decode is chosen when the client has the first token already, and the header.
    answer = await stand.post(completion(stream=True))
    assert answer.headers[ROUTE_HEADER] == "prefill-0; kind=least_work"
    assert stand.metric('pdlaunch_router_routes_total{kind="least_work"}') >= 1


@pytest.mark.parametrize(
    ("fails", "stream"), [("decode-0", True), ("decode-0", False), ("prefill-0", False)]
)
async def test_the_header_names_the_engines_that_made_up_for_others(
    stand: Stand, fails: str, stream: bool
) -> None:
    """Not the one of the estimate, which has failed before the client was told anything."""
    engines = [*costed_pair(), FakeEngine("decode-1", "decode"), FakeEngine("prefill-1", "prefill")]
    for engine in engines:
        engine.costs = costs(engine.role)
        engine.status = 503 if engine.name == fails else None
    await stand.start(engines)
    for view in stand.pool.engines:
        # The one that is to fail has the least to do.
        view.num_streams = 0 if view.name == "decode-0" else 8
        view.context_tokens = 512 * view.num_streams
    if fails == "decode-0":
        load_prefill(stand)
    else:
        load_decode(stand)
    answer = await stand.post(completion(stream=stream))
    assert answer.texts() == {0: expected_text("hello", 6)}
    (failed,) = [engine for engine in engines if engine.name == fails]
    assert len(failed.seen) == 1
    served = [one.name for one in engines if one.seen and one is not failed]
    told = answer.headers[ROUTE_HEADER]
    assert told.startswith("->".join(sorted(served, reverse=True)) + "; kind=least_work; left_out=")


async def test_a_report_that_is_none_changes_nothing(stand: Stand) -> None:
    engines = costed_pair()
    await stand.start(engines)
    (decode,) = [engine for engine in stand.pool.engines if engine.role == "decode"]
    for work in (None, 5, [1], "x", {}):
        stand.state.client.hear(decode, msgspec.json.decode(msgspec.json.encode(work)))
    assert decode.report is None


async def test_the_next_turn_of_a_chat_goes_to_the_engine_of_its_last_answer(stand: Stand) -> None:
    """Both decode engines have streams, so that a prompt unknown to them is for prefill, which
    would have to compute the answer, too.
    """
    engines = [*costed_pair(), FakeEngine("decode-1", "decode")]
    engines[2].costs = costs("decode")
    await stand.start(engines)
    load_decode(stand, 3)
    said = [{"role": "user", "content": "word " * 400}]
    await stand.post(chat(messages=said, max_tokens=300), path="/v1/chat/completions")
    served = next(engine for engine in engines[1:] if engine.seen)
    forget_times(stand)
    said += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "more"}]
    answer = await stand.post(chat(messages=said), path="/v1/chat/completions")
    assert answer.headers[ROUTE_HEADER].startswith(f"{served.name}; kind=decode")
    assert len(engines[0].seen) == 1
    # Another salt shares nothing.
    salted = await stand.post(chat(messages=said, cache_salt="other"), path="/v1/chat/completions")
    assert "kind=pair" in salted.headers[ROUTE_HEADER]
