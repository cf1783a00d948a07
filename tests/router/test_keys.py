"""Clients with several API keys: whose turn it is, whose limit it was, what each has used."""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from pdlaunch.errors import OverloadedError
from pdlaunch.http.headers import SESSION_HEADER
from pdlaunch.protocol.process.bootstrap import ClientKey
from pdlaunch.router.clients import Client
from pdlaunch.router.metrics import RouterMetrics
from pdlaunch.router.pool import MAX_UNBEGUN
from tests.clock import FakeClock
from tests.router.conftest import Answer, Stand, client_key, pair, pairs
from tests.router.fake_engine import FakeEngine, until
from tests.router.test_life_of_a_request import completion

KEYS = (client_key("secret-a", "a"), client_key("secret-b", "b"))
NUMBERS = itertools.count()
LONG, MEDIUM, SHORT = "long " * 2000, "long " * 1000, "short"  # about 2,500 tokens, 1,250, and 2


async def start(stand: Stand, engines: Sequence[FakeEngine], **spec: Any) -> None:
    for engine in engines:
        engine.max_model_len = 100_000
    await stand.start(engines, **{"keys": KEYS, "max_queued_requests": 99} | spec)


async def start_held(stand: Stand, **spec: Any) -> list[FakeEngine]:
    """Start a pair whose prefill engine holds all prompts."""
    engines = pair()
    engines[0].hold_prefill = True
    await start(stand, engines, **spec)
    return engines


def send(
    stand: Stand, name: str, prompt: str, *, session: str = "", **fields: Any
) -> asyncio.Task[Answer]:
    headers = {"Authorization": f"Bearer secret-{name}", SESSION_HEADER: session}
    # No prompt is found in a prefix cache.
    prompt = f"{next(NUMBERS)} {prompt}"
    work = stand.post(completion(prompt=prompt, user=name, **fields), headers=headers)
    return asyncio.ensure_future(work)


def order(engine: FakeEngine) -> str:
    return "".join(seen.body["user"] for seen in engine.seen)


def waiting(stand: Stand) -> int:
    return sum(len(client.flow.waiting) for client in stand.state.clients)


async def test_another_keys_prompt_is_delayed_by_one_long_prompt(stand: Stand) -> None:
    prefill, _ = await start_held(stand)
    works = [send(stand, "a", LONG) for _ in range(5)]
    await until(lambda: waiting(stand) == 4 and prefill.seen)
    works += [send(stand, "b", SHORT) for _ in range(2)]
    await until(lambda: waiting(stand) == 6)
    prefill.go.set()
    assert [answer.status for answer in await asyncio.gather(*works)] == [200] * 7
    assert order(prefill) == "abbaaaa"
    assert stand.metric('pdlaunch_router_key_queue_seconds_total{key="b"}') > 0


@pytest.mark.parametrize(
    ("keys", "prompt", "tokens_per_s", "num_ahead"),
    [
        (KEYS, SHORT, 0, 15),
        (KEYS[:1], LONG, 0, 15),
        (KEYS, SHORT, 40_000, 15),
        (KEYS, SHORT, 10, 1),
    ],
)
async def test_short_prompts_and_those_of_a_single_key_go_together_unless_their_engine_is_slow(
    stand: Stand, keys: Sequence[ClientKey], prompt: str, tokens_per_s: int, num_ahead: int
) -> None:
    prefill, _ = await start_held(stand, keys=keys)
    for engine in stand.pool.engines:
        engine.computed_tokens, engine.computing_s = tokens_per_s, bool(tokens_per_s)
    works = [send(stand, "a", prompt) for _ in range(15)]
    await until(lambda: len(prefill.seen) + waiting(stand) == 15)
    assert len(prefill.seen) == num_ahead
    prefill.go.set()
    assert {answer.status for answer in await asyncio.gather(*works)} == {200}


async def test_prompts_wait_for_a_decode_engine_that_begins_nothing(stand: Stand) -> None:
    prefill, decode = pair()
    decode.hold_after = 0
    await start(stand, [prefill, decode])
    works = [send(stand, "a", LONG, stream=True) for _ in range(2 * MAX_UNBEGUN)]
    # The next one is computed while the last one of these is handed over.
    await until(lambda: len(decode.seen) == MAX_UNBEGUN + 1)
    works.append(send(stand, "b", SHORT, stream=True))
    await until(lambda: waiting(stand) == MAX_UNBEGUN)
    assert len(prefill.seen) == MAX_UNBEGUN + 1
    decode.go.set()
    assert [answer.status for answer in await asyncio.gather(*works)] == [200] * len(works)
    assert order(prefill)[MAX_UNBEGUN + 1 :].startswith("b")


async def test_a_prompt_that_waits_for_one_engine_holds_up_only_that_engine(stand: Stand) -> None:
    engines = pairs(2)
    prefills = engines[:2]
    for prefill in prefills:
        prefill.hold_prefill = True
    await start(stand, engines)
    works = [send(stand, "a", MEDIUM, session="chat")]
    await until(lambda: any(each.seen for each in prefills))
    busy, idle = sorted(prefills, key=lambda each: not each.seen)
    works.append(send(stand, "b", LONG, session="chat"))
    await until(lambda: waiting(stand) == 1)
    works.append(send(stand, "a", LONG))
    await until(lambda: idle.seen)
    # There is room for it, but the engine is kept for the prompt that came earlier.
    works.append(send(stand, "a", SHORT, session="chat"))
    await until(lambda: waiting(stand) == 2)
    busy.go.set()
    await until(lambda: len(busy.seen) == 3)
    idle.go.set()
    assert {answer.status for answer in await asyncio.gather(*works)} == {200}
    assert order(busy) == "aba"


async def test_lower_priorities_of_a_key_go_first(stand: Stand) -> None:
    prefill, decode = await start_held(stand)
    works = [send(stand, "a", LONG, priority=number, seed=number) for number in (0, 5, -7, 1)]
    await until(lambda: waiting(stand) == 3)
    prefill.go.set()
    await asyncio.gather(*works)
    assert [seen.body["seed"] for seen in prefill.seen] == [0, -7, 1, 5]
    # Engines would put them before prompts of other keys.
    assert not any("priority" in seen.body for seen in (*prefill.seen, *decode.seen))
    refused = await send(stand, "a", SHORT, priority="high")
    assert (refused.status, refused.json()["error"]["param"]) == (400, "priority")


async def test_clients_that_leave_and_engines_that_die_hold_up_nobody(stand: Stand) -> None:
    prefill, _ = await start_held(stand)
    works = [send(stand, "a", LONG) for _ in range(3)]
    await until(lambda: waiting(stand) == 2)
    works[1].cancel()
    await until(lambda: waiting(stand) == 1)
    works[0].cancel()
    await until(lambda: len(prefill.seen) == 2)
    prefill.die_after = 0
    late = send(stand, "b", LONG)
    prefill.go.set()
    assert {answer.status for answer in await asyncio.gather(works[2], late)} == {200}
    assert not any(client.num_running for client in stand.state.clients)
    assert {engine.num_unbegun for engine in stand.pool.engines} == {0}
    assert {engine.unbegun_tokens for engine in stand.pool.engines} == {0}


async def test_the_limit_of_a_key_is_named_and_others_are_served(stand: Stand) -> None:
    limited = client_key("secret-a", "a", max_concurrent=2)
    prefill, _ = await start_held(stand, keys=(limited, KEYS[1]))
    works = [send(stand, "a", SHORT) for _ in range(2)]
    await until(lambda: len(prefill.seen) == 2)
    refused = await send(stand, "a", SHORT)
    assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("max_concurrent", "rate_limit_error")
    assert "'a'" in error["message"]
    for name, status in (("a", 429), ("b", 200)):  # also of calls that compute nothing
        headers = {"Authorization": f"Bearer secret-{name}"}
        told = await stand.post({"prompt": "x"}, path="/tokenize", headers=headers)
        assert told.status == status
    works.append(send(stand, "b", SHORT))
    prefill.go.set()
    assert {answer.status for answer in await asyncio.gather(*works)} == {200}
    assert (await send(stand, "a", SHORT)).status == 200


async def test_keys_are_counted_by_name_and_shown_nowhere(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    await start(stand, pair(), keys=(*KEYS, client_key("secret-c", "c", tokens_per_minute=5)))
    for name, status in (("a", 200), ("b", 200), ("c", 200), ("c", 429), ("d", 401)):
        answer = await send(stand, name, SHORT)
        assert answer.status == status
    pages, key = [caplog.text], {"Authorization": "Bearer secret-a"}
    for path in ("/metrics", "/pdlaunch/status", "/pdlaunch/requests"):
        async with stand.session.get(path, headers=key) as response:
            pages.append(await response.text())
    assert 'pdlaunch_router_key_refusals_total{key="c",limit="tokens_per_minute"} 1.0' in pages[1]
    assert 'pdlaunch_router_key_requests_total{key="a"} 1.0' in pages[1]
    assert 'pdlaunch_router_key_generation_tokens_total{key="a"} 6.0' in pages[1]
    assert 'pdlaunch_router_key_prompts_waiting{key="b"} 0.0' in pages[1]
    assert 'key="d"' not in pages[1]
    for page in pages:
        assert "secret-" not in page
        assert not any(each.sha256 in page for each in KEYS)


@pytest.mark.parametrize(("max_tokens", "num_admitted"), [(600, 2), (None, 1)])
async def test_answers_are_charged_when_they_begin_and_what_they_did_not_use_comes_back(
    stand: Stand, max_tokens: int | None, num_admitted: int
) -> None:
    limited = client_key("secret-a", "a", tokens_per_minute=1000)
    prefill, decode = await start_held(stand, keys=(limited,))
    prefill.ends = decode.ends = {0: 3}
    works = [send(stand, "a", SHORT, max_tokens=max_tokens) for _ in range(num_admitted)]
    await until(lambda: len(prefill.seen) == num_admitted)
    refused = await send(stand, "a", SHORT, max_tokens=1)
    error = refused.json()["error"]
    assert (refused.status, error["code"]) == (429, "tokens_per_minute")
    assert refused.headers["Retry-After"] == "1"
    assert "'a'" in error["message"]
    prefill.go.set()
    assert {answer.status for answer in await asyncio.gather(*works)} == {200}
    assert (await send(stand, "a", SHORT, max_tokens=1)).status == 200


@pytest.mark.parametrize(("used", "retry_after_s"), [((100, 0), 1), ((300, 500), 20)])
def test_tokens_that_only_running_requests_hold_are_not_waited_for(
    used: tuple[int, int], retry_after_s: int
) -> None:
    limited = client_key("secret-a", "a", tokens_per_minute=600)
    client = Client(limited, RouterMetrics("tiny"), FakeClock())
    with (
        client.admit(1, 9_000, lambda: used),
        pytest.raises(OverloadedError) as refusal,
        client.admit(1, 1, lambda: (1, 0)),
    ):
        pass
    assert refusal.value.retry_after_s == retry_after_s


def test_the_tokens_of_a_minute_come_back_evenly() -> None:
    clock = FakeClock()
    limited = client_key("secret-a", "a", tokens_per_minute=600)
    client = Client(limited, RouterMetrics("tiny"), clock)

    def ask(estimate: int, used: tuple[int, int]) -> str | None:
        try:
            with client.admit(1, estimate, lambda: used):
                return None
        except Exception as error:
            return str(getattr(error, "retry_after_s", None))

    assert ask(100, (300, 400)) is None  # more than there is: made up for by waiting
    assert ask(1, (1, 0)) == "10"
    clock.now += 9.5
    assert ask(1, (1, 0)) == "1"
    clock.now += 1.0
    assert ask(1, (0, 0)) is None  # failed, and costs nothing
    clock.now += 3600.0
    assert ask(1, (1, 599)) is None
    assert ask(1, (1, 0)) == "1"
