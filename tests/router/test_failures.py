"""Engines that fail, hang, refuse or come back: the client gets one right answer or one clear
error.
"""

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from aiohttp import web

from pdlaunch.errors import OverloadedError
from pdlaunch.http.headers import ORIGIN_HEADER, read_origin
from pdlaunch.observe.spans import PULL, Span, SpanReport
from pdlaunch.protocol.control import Suspects
from pdlaunch.router.client_request import PromptRequest
from pdlaunch.router.engine import OPEN_S
from pdlaunch.router.recovery import Attempts, RecoverySettings
from pdlaunch.router.state import LOST_S
from tests.clock import FakeClock
from tests.http.loop_clock import pass_time
from tests.router.conftest import SPEC, Stand, pair, pairs
from tests.router.fake_engine import FakeEngine, Seen, expected_tokens, until
from tests.router.test_life_of_a_request import chat, completion, expected_text


def decodes(number: int) -> list[FakeEngine]:
    return [FakeEngine(f"decode-{index}", "decode") for index in range(number)]


async def fail(engine: FakeEngine, how: str, status: int) -> None:
    if how == "gone":
        await engine.stop()
    elif how == "status":
        engine.status = status
    else:
        engine.die_after = 0


@pytest.mark.parametrize("how", ["gone", "status", "breaks"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_another_engine_takes_over_where_one_never_began(
    stand: Stand, how: str, role: str
) -> None:
    await stand.start(pairs(2))
    first, second = stand.engines[f"{role}-0"], stand.engines[f"{role}-1"]
    await fail(first, how, 503 if role == "decode" else 500)
    answer = await stand.post(completion(stream=True))
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert answer.finish_reasons() == {0: ["length"]}
    if role == "decode":
        # With the same params.
        params = second.seen[0].body["kv_transfer_params"]
        assert params["pdlaunch"]["first_token_sent"] is True
    assert (len(second.seen), stand.metric("pdlaunch_router_retries_total")) == (1, 1)
    assert stand.metric("pdlaunch_router_migrations_total") == 0
    # Its back-off keeps the next request away.
    num_seen = len(first.seen)
    await stand.post(completion())
    assert len(first.seen) == num_seen


@pytest.mark.parametrize("stream", [True, False])
async def test_without_prefill_engines_decode_does_all(stand: Stand, stream: bool) -> None:
    prefill, decode = await stand.start_pair()
    prefill.status = 500
    answer = await stand.post(completion(stream=stream))
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert "kv_transfer_params" not in decode.seen[0].body
    assert stand.metric("pdlaunch_router_fallbacks_total") == 1
    stand.publish({"prefill-0": None})
    answer = await stand.post(completion(stream=stream))
    assert answer.texts() == {0: expected_text("hello", 6)}


@pytest.mark.parametrize("how", ["breaks", "error event"])
@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_goes_on_at_another_engine(
    stand: Stand, how: str, make: Callable[..., dict[str, Any]], stream: bool, n: int
) -> None:
    await stand.start(pairs(2))
    first, second = stand.engines["decode-0"], stand.engines["decode-1"]
    if how == "breaks":
        stand.die_after(first, 3, num_told=3 + n)
    else:
        first.error_after = 3
    prompt = make().get("messages", "hello")
    answer = await stand.post(make(stream=stream, n=n, logprobs=True if make is chat else 1))
    assert answer.texts() == {
        choice: expected_text(prompt, 6, choice=choice) for choice in range(n)
    }
    if n == 1:
        logprobs = [choice["logprobs"] for choice in answer.choices() if choice["logprobs"]]
        tokens = [each["token"] for part in logprobs for each in part.get("content", [])]
        tokens += [token for part in logprobs for token in part.get("tokens", [])]
        assert tokens == [str(token) for token in expected_tokens(prompt, 7, 0, 6)]
    resume = second.seen[0].body["resume"]
    assert sum(map(len, resume["choices"])) == 3 + n
    assert "kv_transfer_params" not in second.seen[0].body
    assert stand.metric("pdlaunch_router_migrations_total") == 1
    if stream:
        assert answer.finish_reasons() == {choice: ["length"] for choice in range(n)}


async def test_a_stream_waits_for_the_restarted_engine(stand: Stand) -> None:
    _, decode = await stand.start_pair()
    stand.die_after(decode, 2, num_told=3)
    request = asyncio.ensure_future(stand.post(completion(stream=True)))
    await until(lambda: decode.seen)
    stand.publish({"prefill-0": None, "decode-0": None})
    await until(lambda: stand.metric("pdlaunch_router_engine_failures_total"))
    decode.die_after = None
    decode.rank_incarnation = 2
    stand.publish({"prefill-0": None})
    answer = await request
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert "resume" in decode.seen[1].body
    assert decode.seen[1].headers["X-Request-Id"] != decode.seen[0].headers["X-Request-Id"]


async def test_a_prefill_engine_that_stands_in_does_not_pull_from_itself(stand: Stand) -> None:
    prefill, decode = await stand.start_pair()
    decode.status = 503
    answer = await stand.post(completion(stream=True))
    assert answer.texts() == {0: expected_text("hello", 6)}
    params = prefill.seen[1].body["kv_transfer_params"]
    assert params["do_remote_prefill"] is False
    assert params["pdlaunch"]["first_token_sent"] is True
    await until(lambda: prefill.released)
    assert not prefill.leases


async def test_an_engine_that_fails_every_time_is_not_asked_for_ever(stand: Stand) -> None:
    engines = pairs(5)
    for engine in engines:
        engine.status = 500
    await stand.start(engines)
    answer = await stand.post(completion())
    assert answer.status == 502
    assert sum(len(engine.seen) for engine in engines) == 8


async def test_a_refusal_after_the_first_token_is_an_event(stand: Stand) -> None:
    prefill, decode = await stand.start_pair()
    decode.status = 400
    decode.error_body = b'{"error": {"message": "no", "param": "stop"}}'
    answer = await stand.post(completion(stream=True))
    assert answer.status == 200
    assert answer.events()[-1] == msgspec.json.decode(decode.error_body)
    whole = await stand.post(completion())
    assert (whole.status, whole.raw) == (400, decode.error_body)
    await stand.state.settled()
    assert not prefill.leases


async def test_busy_engines_are_passed_over_and_in_the_end_said_so(stand: Stand) -> None:
    engines = pairs(2)
    await stand.start(engines)
    for name in ("prefill-0", "decode-0"):
        stand.engines[name].status = 429
    assert (await stand.post(completion())).texts() == {0: expected_text("hello", 6)}
    for engine in engines:
        engine.status = 429
    answer = await stand.post(completion())
    assert answer.status == 429
    assert stand.metric("pdlaunch_router_engine_failures_total") == 0


async def test_an_answer_that_has_begun_waits_for_room(stand: Stand) -> None:
    prefill, decode = await stand.start_pair()
    decode.status = 429
    async with stand.session.post("/v1/completions", json=completion(stream=True)) as response:
        await response.content.readuntil(b"\n\n")
        prefill.status = 429
        await until(lambda: len(decode.seen) >= 3)
        decode.status = None
        rest = await response.read()
    assert rest.endswith(b"data: [DONE]\n\n")


SPOILT = {
    "no usage": lambda answer: answer.pop("usage"),
    "a text that is none": lambda answer: answer["choices"][0].update(text=7),
    "it gave up": lambda answer: answer["choices"][0].update(finish_reason="error"),
}


@pytest.mark.parametrize("how", SPOILT)
async def test_no_lease_of_an_answer_that_cannot_be_read_is_kept(stand: Stand, how: str) -> None:
    """One that is found wrong as it is sent on is an error: the client may have some of it."""
    prefill, decode = await stand.start_pair()
    prefill.spoil = SPOILT[how]
    answer = await stand.post(completion())
    if how == "a text that is none":
        assert (answer.status, answer.json()["error"]["code"]) == (502, "engine_failed")
        assert not decode.seen
    else:
        assert answer.texts() == {0: expected_text("hello", 6)}
        assert "kv_transfer_params" not in decode.seen[0].body
    await stand.state.settled()
    assert len(prefill.released) == 1
    assert all(engine.num_outstanding == 0 for engine in stand.pool.engines)


@pytest.mark.parametrize("how", ["it hangs", "its host is lost"])
async def test_an_engine_that_does_not_answer_any_more_is_left(stand: Stand, how: str) -> None:
    """One that hangs has no rank of ours, whose end the supervisor would see to."""
    _, decode = await stand.start_pair()
    other = FakeEngine("decode-1", "decode")
    decode.hold_after = 2
    request = asyncio.ensure_future(stand.post(completion(stream=True)))
    await decode.holding.wait()
    await other.start()
    stand.engines["decode-1"] = other
    if how == "it hangs":
        decode.has_rank, decode.state = False, "stalled"
        stand.publish()
    else:
        stand.publish({"decode-0": None})
    await asyncio.sleep(0)
    assert not request.done()
    pass_time(LOST_S)
    assert (await request).texts() == {0: expected_text("hello", 6)}
    await until(lambda: decode.num_aborted)


@pytest.mark.parametrize("stream", [True, False])
async def test_the_request_timeout_is_an_answer(stand: Stand, stream: bool) -> None:
    _, decode = await stand.start_pair()
    decode.hold_after = 2
    request = asyncio.ensure_future(stand.post(completion(stream=stream)))
    await decode.holding.wait()
    pass_time(SPEC.request_timeout_s)
    answer = await request
    if stream:
        assert answer.events()[-1]["error"]["code"] == "request_timeout"
    else:
        assert answer.status == 503
        assert "Retry-After" in answer.headers
    await until(lambda: decode.num_aborted)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("publishes", ["its rank is gone", "all of it is gone"])
async def test_decode_gets_the_params_of_a_prefill_engine_that_has_died_since(
    stand: Stand, stream: bool, publishes: str
) -> None:
    prefill, decode = await stand.start_pair()
    prefill.hold_prefill = True
    request = asyncio.ensure_future(stand.post(completion(stream=stream)))
    await prefill.holding.wait()
    if publishes == "its rank is gone":
        stand.publish({"prefill-0": "starting"})
    else:
        stand.publish({"prefill-0": None})
    prefill.go.set()
    assert (await request).texts() == {0: expected_text("hello", 6)}
    params = decode.seen[0].body["kv_transfer_params"]
    assert params["do_remote_prefill"] is True
    assert params["remote_request_id"] in prefill.leases
    assert params["pdlaunch"]["first_token_sent"] is True
    assert len(prefill.seen) == len(decode.seen) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_turns_requests_away_is_asked_until_it_does_not(
    stand: Stand, stream: bool
) -> None:
    (engine,) = decodes(1)
    await stand.start([engine], recovery_wait_s=1e6)
    engine.status = 503
    request = asyncio.ensure_future(stand.post(completion(stream=stream)))
    await until(lambda: len(engine.seen) > 2 * stand.state.recovery.max_attempts)
    engine.status = None
    assert (await request).texts() == {0: expected_text("hello", 6)}
    ids = [seen.headers["X-Request-Id"] for seen in engine.seen]
    assert len(ids) == len(set(ids))
    assert stand.metric("pdlaunch_router_retries_total") == len(ids) - 1


@pytest.mark.parametrize("body", [b'{"error": "\xff"}', b'{"error": ' + b"[" * 100_000])
async def test_a_stream_goes_on_elsewhere_after_an_event_that_is_no_json(
    stand: Stand, body: bytes
) -> None:
    _, decode = await stand.start_pair()
    decode.error_after, decode.error_body = 2, body
    answer = await stand.post(completion(stream=True))
    assert answer.texts() == {0: expected_text("hello", 6)}


@pytest.mark.parametrize("is_suspect", [False, True])
async def test_failures_count_since_the_last_new_token(stand: Stand, is_suspect: bool) -> None:
    """Each engine dies after a token. A suspect could kill them all so, token by token."""
    engines = decodes(6)

    def has_sent_token() -> bool:
        seen = [each for engine in engines for each in engine.seen]
        if is_suspect:
            origins = [read_origin(seen[0].headers[ORIGIN_HEADER])[0]]
            stand.state.suspects.take(Suspects(origins=origins, repeated=[]))
        return stand.metric("pdlaunch_router_generation_tokens_total") >= len(seen)

    for engine in engines:
        engine.die_after, engine.may_die = 1, has_sent_token
    await stand.start(engines)
    answer = await stand.post(completion(stream=True))
    num_tokens = stand.state.recovery.max_attempts if is_suspect else 6
    assert answer.texts() == {0: expected_text("hello", num_tokens)}
    assert ("error" in answer.events()[-1]) == is_suspect


async def test_who_fails_gets_one_try_at_a_time_until_it_is_well(stand: Stand) -> None:
    engines = decodes(2)
    await stand.start(engines)
    clock, sick = FakeClock(), engines[1]
    stand.pool.clock = clock
    sick.status = 500

    async def ask(number: int) -> None:
        for _ in range(number):
            answer = await stand.post(completion(stream=True))
            assert answer.texts() == {0: expected_text("hello", 6)}

    async def told() -> str:
        _, shown = (await stand.get("/pdlaunch/status"))["engines"]
        return f"{shown['health']}: {shown['left_out']}"

    await ask(4)
    assert len(sick.seen) == 1
    assert (await told()).startswith("open: open after 1 failures")
    # A try that fails is made up for by the other engine, and the next one comes later.
    clock.now += OPEN_S
    assert (await told()).startswith("half_open: ")
    for number in (4, 2):
        await ask(number)
        assert len(sick.seen) == 2
        clock.now += OPEN_S
    sick.status = None
    await ask(1)
    assert (len(sick.seen), await told()) == (3, "closed: ")


async def test_pulls_that_fail_leave_out_the_pair_and_no_engine(stand: Stand) -> None:
    """Decode computes the prompts itself, as engines do, and tells so in its spans."""
    engines = pairs(1)
    await stand.start(engines)
    clock, decode = FakeClock(), engines[1]
    stand.pool.clock = clock
    span = Span(PULL, 0.0, 0.1, {"error": "no such peer"})
    decode.report = msgspec.to_builtins(SpanReport(elapsed_s=0.2, spans=[span]))
    for pulls in (1, 1, 1):
        assert (await stand.post(completion(stream=True))).status == 200
        asked = [seen for seen in decode.seen if "kv_transfer_params" in seen.body]
        assert len(asked) == pulls
    assert stand.pool.pair_states() == {("prefill-0", "decode-0"): "open"}
    decode.report = None
    clock.now += OPEN_S
    assert (await stand.post(completion(stream=True))).status == 200
    assert stand.pool.pair_states() == {("prefill-0", "decode-0"): "closed"}


RESTARTING = {"message": "x", "type": "service_unavailable_error", "code": "engine_restarting"}


def die_of_requests(stand: Stand, engine: FakeEngine, *, news_after_s: float = 0.0) -> None:
    """Its rank dies of whatever it gets. The registry and the suspects are told ``news_after_s``
    later than the server.
    """

    async def die(request: web.Request, seen: Seen) -> web.StreamResponse:
        origin, is_suspect = read_origin(seen.headers[ORIGIN_HEADER])
        assert origin

        def tell() -> None:
            repeated = [origin] if is_suspect else []
            stand.state.suspects.take(Suspects(origins=[origin, 12345], repeated=repeated))
            stand.publish({engine.name: "starting"})

        if news_after_s:
            loop = asyncio.get_running_loop()
            loop.call_later(0.05, pass_time, news_after_s - 0.05)
            loop.call_later(0.05 + news_after_s, tell)
        else:
            tell()
        return web.json_response({"error": RESTARTING}, status=503)

    engine._answer = die  # type: ignore[method-assign]


def marks(stand: Stand) -> list[bool]:
    """Of all that engines have seen: whether it was marked as a suspect."""
    return [
        read_origin(seen.headers[ORIGIN_HEADER])[1]
        for engine in stand.engines.values()
        for seen in engine.seen
    ]


@pytest.mark.parametrize("news_after_s", [0.0, 0.1, 4.0])
@pytest.mark.parametrize("stream", [False, True])
async def test_request_that_kills_fails_after_two_deaths(
    stand: Stand, stream: bool, news_after_s: float
) -> None:
    await stand.start(pairs(2))
    for engine in stand.engines.values():
        die_of_requests(stand, engine, news_after_s=news_after_s)
    answer = await stand.post(completion(stream=stream))
    assert answer.status == 500
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("request_kills_engine", "server_error")
    assert "twice" in error["message"]
    assert answer.headers["X-Should-Retry"] == "false", "OpenAI's clients would send it again"
    assert sorted(marks(stand)) == [False, True]


@pytest.mark.parametrize("stream", [False, True])
async def test_innocent_request_is_answered_by_the_next_engine_which_is_told(
    stand: Stand, stream: bool
) -> None:
    await stand.start(pairs(2))
    die_of_requests(stand, stand.engines["prefill-0"], news_after_s=0.1)
    answer = await stand.post(completion(stream=stream))
    assert answer.texts() == {0: expected_text("hello", 6)}
    assert sorted(marks(stand)) == [False, True, True], "prefill, prefill again, decode"
    for engine in stand.engines.values():
        engine.seen.clear()
    await stand.post(completion())
    assert True not in marks(stand), "the next request has nothing to do with it"
    assert stand.state.suspects._num_deaths == {}


@pytest.mark.parametrize("header", [None, "", "0", "-1", "x", "1;other", str(2**63), "1" * 30])
def test_headers_that_say_nothing(header: str | None) -> None:
    assert read_origin(header) == (0, False)


async def test_a_body_that_engines_refuse_is_freed_without_the_collector(stand: Stand) -> None:
    for engine in (engines := pair()):
        engine.status = 400
    await stand.start(engines)
    gc.disable()
    try:
        assert (await stand.post(completion())).status == 400
        with pytest.raises(OverloadedError):
            Attempts(RecoverySettings(wait_s=0.0)).wait_s(1.0, has_tokens=False)
        kinds = (PromptRequest, Attempts)
        assert not any(isinstance(each, kinds) for each in gc.get_objects())
    finally:
        gc.enable()
