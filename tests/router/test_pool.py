"""Engines as the registry and the outcomes of their requests show them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.config.roles import Role
from pdlaunch.protocol.control import Address, Entry, Registry
from pdlaunch.router.engine import MAX_OPEN_S, TRY_LASTS_S, Breaker, Engine, EngineKey
from pdlaunch.router.policy import RoutingRequest
from pdlaunch.router.pool import EnginePool
from pdlaunch.router.prefix_index import ServedPrefixes, hash_prefix


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def server(name: str, role: Role | None = None, **fields: object) -> Entry:
    role = role or ("prefill" if name.startswith("prefill") else "decode")
    entry = Entry(
        name=name,
        kind="server",
        engine=name,
        incarnation=1,
        role=role,
        address=Address(http=f"http://{name}"),
        state="ready",
    )
    return msgspec.structs.replace(entry, **fields)


def rank(engine: str, tp_rank: int = 0, tp_size: int = 1, **fields: object) -> Entry:
    entry = Entry(
        name=f"{engine}/rank-{tp_rank}",
        kind="rank",
        engine=engine,
        incarnation=1,
        tp_rank=tp_rank,
        tp_size=tp_size,
        state="ready",
    )
    return msgspec.structs.replace(entry, **fields)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool(clock: Clock) -> EnginePool:
    return EnginePool(clock)


def update(pool: EnginePool, *entries: Entry) -> None:
    pool.update(Registry(version=1, entries=list(entries)))


def pick(
    pool: EnginePool,
    role: Role,
    *,
    tried: Collection[EngineKey] = (),
) -> Engine | None:
    """Have the pool choose one engine for all of a request, preferably of this role."""
    request = RoutingRequest(
        max_tokens=1 if role == "prefill" else None,
        is_begun=True,
        tried=frozenset(tried),
    )
    return pool.route(request).decode


@contextlib.contextmanager
def work(engine: Engine, *, num_streams: int = 0, num_prompt_tokens: int = 0) -> Iterator[None]:
    """Work of which the first token has come, if it streams."""
    with engine.working(
        lambda: 100.0,
        num_prompt_tokens=num_prompt_tokens,
        num_streams=num_streams,
        num_uncached=0 if num_streams else num_prompt_tokens,
    ) as begin:
        if num_streams:
            begin()
        yield


def named(engine: Engine | None) -> str:
    assert engine is not None
    return engine.name


def test_who_is_drained_knows_its_chats_and_who_slept_or_left_does_not(clock: Clock) -> None:
    index = ServedPrefixes()
    pool, prefix = EnginePool(clock, index=index), hash_prefix(b"x" * 600, "")

    def known(*steps: Entry | None) -> int:
        """Return what is known of an engine that has served a prompt, after these steps."""
        update(pool)
        update(pool, server("decode-0"))
        index.served(pool.engines[0], prefix, 150, 50)
        for step in steps:
            update(pool, *([] if step is None else [step]))
        update(pool, server("decode-0"))
        return index.num_cached_tokens(pool.engines[0], prefix)

    assert known() == 200
    assert known(server("decode-0", withheld="draining")) == 200
    assert known(server("decode-0", state="stalled")) == 200
    assert known(server("decode-0", state="sleeping")) == 0
    assert known(None) == 0


def test_the_speed_of_an_engine_is_that_of_its_prompts(clock: Clock, pool: EnginePool) -> None:
    update(pool, server("prefill-0"))
    (engine,) = pool.engines
    assert engine.tokens_per_s == 0.0

    def prompt() -> AbstractContextManager[Callable[[], None]]:
        return engine.working(clock, num_prompt_tokens=500, num_uncached=400)

    with prompt() as first, prompt() as second:
        assert engine.waiting_tokens(clock(), 100.0) == 800
        clock.now_s += 2.0
        assert engine.waiting_tokens(clock(), 100.0) == 600
        first()
        assert engine.waiting_tokens(clock(), 100.0) == 400
        clock.now_s += 2.0
        second()
    assert engine.tokens_per_s == pytest.approx(200.0)
    # One that ends without a token says nothing, and idle time does not count.
    clock.now_s += 60.0
    with prompt():
        clock.now_s += 60.0
    assert engine.tokens_per_s == pytest.approx(200.0)
    assert (engine.num_works, engine.unanswered_tokens, engine.kv_tokens) == (0, 0, 0)


@pytest.mark.parametrize(
    ("entries", "ready"),
    [
        ([server("decode-0")], True),
        ([server("decode-0", state="starting")], False),
        ([server("decode-0", state="draining")], False),
        ([server("decode-0", address=Address())], False),
        ([server("decode-0"), rank("decode-0")], True),
        ([server("decode-0"), rank("decode-0", state="starting")], False),
        ([server("decode-0"), rank("decode-0", 0, 3), rank("decode-0", 1, 3)], False),
        ([server("decode-0"), rank("decode-0", 0, 2), rank("decode-0", 1, 2)], True),
        ([server("decode-0"), rank("prefill-0", state="starting")], True),
        ([rank("decode-0")], False),
    ],
)
def test_readiness(pool: EnginePool, entries: list[Entry], ready: bool) -> None:
    update(pool, *entries)
    assert (pick(pool, "decode") is not None) == ready


def test_work_is_kept_over_updates_but_not_over_restarts(pool: EnginePool) -> None:
    update(pool, server("decode-0"), rank("decode-0"))
    (first,) = pool.engines
    first.max_model_len = 10
    with work(first, num_streams=1, num_prompt_tokens=7):
        update(pool, server("decode-0"), rank("decode-0"), server("decode-1"))
        assert named(pick(pool, "decode")) == "decode-1"
        update(pool, server("decode-0"), rank("decode-0", incarnation=2))
        (second,) = pool.engines
        assert second.key != first.key
        assert (second.num_streams, second.max_model_len) == (0, None)
    assert first.num_streams == 0


Action = tuple[Literal["start", "end", "fail", "tick"], int]


@given(st.lists(st.tuples(st.sampled_from(["start", "end", "fail", "tick"]), st.integers(0, 3))))
def test_no_engine_is_starved_or_overloaded(actions: list[Action]) -> None:
    clock = Clock()
    pool = EnginePool(clock)
    update(pool, *(server(f"decode-{index}") for index in range(3)))
    running: list[AbstractContextManager[None]] = []
    for action, number in actions:
        if action == "start":
            usable = [one for one in pool.engines if one.health.takes(clock())]
            tries = [one for one in usable if one.health.is_tripped]
            engine = pick(pool, "decode")
            assert engine is not None
            assert engine in (tries or usable) or not usable
            among = tries or usable
            assert not among or engine.num_streams == min(one.num_streams for one in among)
            running.append(work(engine, num_streams=1, num_prompt_tokens=1))
            running[-1].__enter__()
        elif action == "end" and running:
            running.pop(number % len(running)).__exit__(None, None, None)
        elif action == "fail":
            pool.failed(pool.engines[number % 3])
        else:
            clock.now_s += number
        assert sum(engine.num_streams for engine in pool.engines) == len(running)


def test_an_engine_that_is_held_is_given_work_when_released_or_replaced() -> None:
    pool = EnginePool(Clock())
    update(pool, server("prefill-0"), server("decode-0"))
    prefill = pool.engines[1]
    pool.hold(prefill, "draining")
    assert named(pick(pool, "prefill")) == "decode-0"
    # A registry that does not know of it changes nothing.
    update(pool, server("prefill-0"), server("decode-0"))
    assert named(pick(pool, "prefill")) == "decode-0"
    assert prefill.state == "draining"
    pool.release(prefill)
    assert named(pick(pool, "prefill")) == "prefill-0"
    pool.hold(prefill, "sleeping")
    update(pool, server("prefill-0", incarnation=2), server("decode-0"))
    assert named(pick(pool, "prefill")) == "prefill-0"


def test_each_failed_try_opens_it_for_twice_as_long() -> None:
    breaker, now_at, lengths = Breaker(), 0.0, []
    for _ in range(1100):
        breaker.failed(now_at)
        lengths.append(breaker.open_until_at - now_at)
        now_at = breaker.open_until_at
        breaker.asked(now_at)
    assert lengths[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, MAX_OPEN_S]
    assert lengths[-1] == MAX_OPEN_S


@given(st.lists(st.tuples(st.sampled_from(["ask", "fail", "answer", "end"]), st.floats(0, 40))))
def test_it_never_stays_shut(events: list[tuple[str, float]]) -> None:
    breaker, now_at = Breaker(), 0.0
    for event, seconds in events:
        now_at += seconds
        {
            "ask": breaker.asked,
            "fail": breaker.failed,
            "answer": breaker.answers,
            "end": breaker.succeeded,
        }[event](now_at)
        assert breaker.takes(now_at) == (breaker.why(now_at) == "")
        assert breaker.open_until_at - now_at <= MAX_OPEN_S + 1e-9  # of the difference of floats
        assert breaker.takes(now_at + MAX_OPEN_S + TRY_LASTS_S)
    now_at = max(now_at, breaker.open_until_at)
    breaker.succeeded(now_at)
    assert breaker.state(now_at) == "closed"
