"""The routing policy, which answers from its arguments alone and changes none of them; the prefixes
that it looks up, and the pool of engines that it chooses from.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.config.roles import Role
from pdlaunch.config.shared_settings import RoutingPolicy
from pdlaunch.protocol.control import Address, Capabilities, Entry, Registry
from pdlaunch.protocol.kv_events import KVBlocks
from pdlaunch.router import policy as policies
from pdlaunch.router.engine import MAX_OPEN_S, TRY_LASTS_S, Breaker, Engine, EngineHealth, EngineKey
from pdlaunch.router.kv_index import KVIndex, PromptTokens
from pdlaunch.router.policy import SHORT_TOKENS, Route, RoutingRequest
from pdlaunch.router.pool import EnginePool
from tests.clock import FakeClock
from tests.router.fake_engine import rank, server

CPU = frozenset({"cpu"})


def engine(name: str, **fields: object) -> Engine:
    """Return a ready engine; fields of ``Entry`` go to the entry of its server."""
    own = set(Engine.__struct_fields__)
    of_entry = {key: fields.pop(key) for key in fields.keys() - own}
    default = {"processes": (1,), "ready": True, "state": "ready", "devices": CPU}
    of_entry = {"role": name.partition("-")[0]} | of_entry
    return Engine(entry=server(name, **of_entry), **(default | fields))


def choose(
    request: RoutingRequest,
    engines: list[Engine],
    now_at: float = 0.0,
    *,
    index: KVIndex | None = None,
    policy: RoutingPolicy = "load",
) -> Route:
    return policies.choose(request, engines, index or KVIndex(), now_at, policy)


def prompt(**fields: object) -> RoutingRequest:
    return RoutingRequest(**({"num_prompt_tokens": 512} | fields))


def speed(tokens_per_s: float) -> dict[str, float]:
    return {"computed_tokens": tokens_per_s, "computing_s": 1.0}


def test_without_a_pair_the_reason_says_what_is_missing() -> None:
    prefill, decode = engine("prefill-0"), engine("decode-0")
    for engines, reason in (
        ([prefill], "no decode engine is ready"),
        ([decode], "no prefill engine is ready"),
        ([engine("prefill-0", peers=("decode-1",)), proofless("decode-0")],
         "no pair is proven"),
        ([], "no engine is ready"),
    ):  # fmt: skip
        route = choose(prompt(), engines)
        assert (route.prefill, route.reason) == (None, reason)
        assert route.is_fallback == bool(engines)
    one = choose(prompt(max_tokens=1), [prefill, decode])
    assert (one.prefill, one.decode, one.is_fallback) == (None, prefill, False)
    alone = choose(prompt(alone="no lease"), [engine("prefill-0"), proofless("decode-0")])
    assert (alone.prefill, alone.reason) == (None, "no lease")


def proofless(name: str) -> Engine:
    return engine(name, capabilities=Capabilities(kind="vllm"))


def test_pairs_come_first_then_engines_of_both_roles() -> None:
    prefill, decode, both = engine("prefill-0"), engine("decode-0"), engine("both-0")
    route = choose(prompt(), [both, prefill, decode])
    assert (route.prefill, route.decode) == (prefill, decode)
    whole = prompt(is_begun=True)
    assert choose(whole, [prefill, decode, both]).decode is both
    # One that is not there, or has failed this prompt, leaves it to the others.
    assert choose(whole, [prefill, decode]).decode is decode
    tried = prompt(is_begun=True, tried=frozenset({both.key}))
    assert choose(tried, [prefill, decode, both]).decode is decode


def test_kv_blocks_go_to_peers_alone() -> None:
    """In large launches an engine shakes hands with some of the others."""
    prefill = engine("prefill-0", peers=("decode-1",))
    stranger = engine("decode-0", peers=("prefill-1",))
    peer = engine("decode-1", peers=("prefill-0",), kv_tokens=5000)
    assert choose(prompt(), [prefill, stranger]).prefill is None
    assert choose(prompt(), [prefill, stranger, peer]).decode is peer
    computed = prompt(is_begun=True, holder=prefill)
    assert choose(computed, [prefill, stranger, peer]).decode is peer
    # Without a peer the prompt is computed again.
    assert choose(computed, [prefill, stranger]).decode is stranger


def test_the_least_loaded_engines_are_chosen() -> None:
    busy = engine("prefill-0", unanswered_tokens=1000)
    free, full, empty = engine("prefill-1"), engine("decode-0", kv_tokens=900), engine("decode-1")
    route = choose(prompt(), [busy, free, full, empty])
    assert (route.prefill, route.decode) == (free, empty)
    # Time has passed in which it has computed what waited.
    fast = engine("prefill-0", unanswered_tokens=1000, **speed(2000))
    slow = engine("prefill-1", unanswered_tokens=600, **speed(1000))
    assert choose(prompt(), [fast, slow, empty], 0.4).prefill is fast


TOKENS = PromptTokens(range(512))


def index_of(**num_held: int) -> KVIndex:
    """Engines that hold so many of the first tokens, and other blocks besides where they are more.

    Each has room for 4,096 tokens.
    """
    index = KVIndex()
    for name, number in num_held.items():
        keys = TOKENS.keys(16)[: number // 16]
        keys += range(1, number // 16 - len(keys) + 1)
        change = KVBlocks(block_size=16, num_blocks=256, stored={"device": keys})
        index.apply(name.replace("_", "-"), change)
    return index


def test_a_prompt_goes_where_its_prefix_is_cached() -> None:
    first, second, decode = engine("prefill-0"), engine("prefill-1"), engine("decode-0")
    request = prompt(tokens=TOKENS)
    index = index_of(prefill_0=0, prefill_1=256)
    assert choose(request, [first, second, decode], index=index).prefill is second
    # Unless it waits longer there than to compute the prompt elsewhere.
    busy = engine("prefill-1", unanswered_tokens=300)
    assert choose(request, [first, busy, decode], index=index).prefill is first
    # With the answers of earlier turns decode has nearly all of it.
    route = choose(request, [first, decode], index=index_of(prefill_0=256, decode_0=496))
    assert (route.prefill, route.decode) == (None, decode)
    assert route.reason == "little is left to compute"
    # Also where it counts as slow: short prompts are all that it has computed.
    slow, index = engine("decode-0", **speed(250)), index_of(prefill_0=480, decode_0=496)
    assert choose(request, [engine("prefill-0", **speed(1000)), slow], index=index).prefill is None


def test_a_pair_takes_the_decode_engine_that_holds_the_fewest_tokens_afterwards() -> None:
    prefill, one, other = engine("prefill-0"), engine("decode-0"), engine("decode-1", kv_tokens=200)
    request = prompt(tokens=TOKENS)
    assert choose(request, [prefill, one, other], index=index_of(decode_1=256)).decode is other
    assert choose(request, [prefill, one, other], index=index_of(decode_1=160)).decode is one
    # One that has no room for the rest of the prompt comes last.
    full = engine("decode-1", kv_tokens=3_900)
    empty = engine("decode-0", kv_tokens=3_500)
    index = index_of(decode_0=0, decode_1=256)
    assert choose(request, [prefill, empty, full], index=index).decode is empty


def test_an_engine_over_its_share_attracts_nobody() -> None:
    """All chats with one system prompt would be sent to one cache, while others are empty."""
    first, second = engine("prefill-0"), engine("prefill-1", last_pick=-1)
    request, engines = prompt(tokens=TOKENS), [first, second, engine("decode-0")]
    assert choose(request, engines, index=index_of(prefill_0=1024, prefill_1=0)).prefill is first
    assert choose(request, engines, index=index_of(prefill_0=4096, prefill_1=0)).prefill is second
    # With others in the other cache each keeps what it has.
    index = index_of(prefill_0=4096)
    others = KVBlocks(block_size=16, num_blocks=256, stored={"device": [*range(128)]})
    index.apply("prefill-1", others)
    assert choose(request, engines, index=index).prefill is first


def test_requests_of_a_session_go_to_the_same_engines_until_these_leave() -> None:
    engines = [engine(f"{role}-{n}") for role in ("prefill", "decode") for n in range(3)]
    routes = {session: choose(prompt(session=session), engines) for session in map(str, range(30))}
    assert len({route.name for route in routes.values()}) > 3
    for one in engines:
        one.kv_tokens = one.last_pick = hash(one.name) % 1000
    for session, route in routes.items():
        assert choose(prompt(session=session), engines) == route
        left = [one for one in engines if one is not route.prefill]
        moved = choose(prompt(session=session), left)
        assert moved.prefill is not route.prefill
        assert moved.decode is route.decode


def test_short_prompts_and_long_queues_are_computed_where_they_are_decoded() -> None:
    decode = engine("decode-0")
    fast = [engine("prefill-0", **speed(50_000)), engine("decode-0", **speed(50_000))]
    assert choose(prompt(num_prompt_tokens=SHORT_TOKENS), fast).kind == "decode"
    assert choose(prompt(num_prompt_tokens=SHORT_TOKENS + 1), fast).kind == "pair"
    # A CPU computes few tokens in the time of a hand-over.
    slow = [engine("prefill-0", **speed(1000)), engine("decode-0", **speed(1000))]
    assert choose(prompt(num_prompt_tokens=30), slow).kind == "pair"
    assert choose(prompt(num_prompt_tokens=5), slow).kind == "decode"
    waits = engine("prefill-0", unanswered_tokens=1024)
    assert choose(prompt(), [waits, decode]).reason == "the prefill queue is longer"
    # Not if as much waits at decode, nor with many streams there.
    assert choose(prompt(), [waits, engine("decode-0", unanswered_tokens=900)]).kind == "pair"
    assert choose(prompt(), [waits, engine("decode-0", kv_tokens=30_000)]).kind == "pair"


def test_an_idle_prefill_engine_gets_prompts_however_slow_its_last_ones_were() -> None:
    """Else the first prompt of a cold engine decides for good: without prompts no new speed."""
    cold, warm = engine("prefill-0", **speed(500)), engine("decode-0", **speed(5000))
    assert choose(prompt(), [cold, warm]).kind == "pair"
    busy = engine("prefill-0", unanswered_tokens=512, **speed(500))
    assert choose(prompt(), [busy, warm]).reason == "the prefill queue is longer"


@pytest.mark.parametrize(
    "request_",
    [
        prompt(wants_pair=True),
        prompt(is_suspect=True),
        prompt(tried=frozenset({("decode-7", (1,), 0)})),
    ],
)
def test_some_prompts_always_get_a_pair(request_: RoutingRequest) -> None:
    engines = [engine("prefill-0", unanswered_tokens=99_999), engine("decode-0")]
    assert choose(prompt(), engines).kind == "decode"
    assert choose(request_, engines).kind == "pair"
    assert choose(prompt(), engines, policy="pairs").kind == "pair"


def test_engines_that_share_a_gpu_never_take_each_others_prompts() -> None:
    def kind(prefill: list[str], decode: list[str], host: str = "b") -> str:
        waits = engine("prefill-0", unanswered_tokens=99_999, devices=frozenset(prefill), host="a")
        return choose(
            prompt(), [waits, engine("decode-0", devices=frozenset(decode), host=host)]
        ).kind

    assert kind(["a/cuda:0"], ["a/cuda:0"], "a") == "pair"
    assert kind(["a/cuda:0", "a/cuda:1"], ["a/cuda:1"], "a") == "pair"
    assert kind(["a/cuda:0"], ["a/cuda:1"], "a") == "decode"
    assert kind(["a/cuda:0"], ["b/cuda:0"]) == "decode"
    assert kind(["cpu"], ["cpu"], "a") == "decode"
    assert kind([], [], "a") == "decode", "devices that nobody has told"


HEALTH = st.builds(
    EngineHealth,
    is_tripped=st.booleans(),
    num_failures=st.integers(0, 9),
    open_until_at=st.floats(90, 110),
    tried_until_at=st.floats(90, 110),
)
ENGINES = st.lists(
    st.builds(
        engine,
        st.sampled_from(["prefill-0", "prefill-1", "decode-0", "decode-1", "both-0"]),
        ready=st.booleans(),
        unanswered_tokens=st.integers(0, 3000),
        kv_tokens=st.integers(0, 3000),
        num_streams=st.integers(0, 3),
        last_pick=st.integers(0, 3),
        computed_tokens=st.floats(0, 100),
        computing_s=st.sampled_from([0.0, 1.0]),
        health=HEALTH,
        capabilities=st.builds(Capabilities, kind=st.sampled_from(["native", "vllm"])),
    ),
    max_size=5,
    unique_by=lambda one: one.name,
)
REQUESTS = st.builds(
    prompt,
    num_prompt_tokens=st.sampled_from([1, 512]),
    max_tokens=st.sampled_from([None, 1, 5]),
    is_begun=st.booleans(),
    is_suspect=st.booleans(),
    must_continue=st.booleans(),
)


@given(REQUESTS, ENGINES, st.data())
def test_what_is_chosen_can_serve_and_nothing_is_changed(
    request: RoutingRequest, engines: list[Engine], data: st.DataObject
) -> None:
    tried = data.draw(st.frozensets(st.sampled_from(engines))) if engines else frozenset()
    request = msgspec.structs.replace(request, tried=frozenset(one.key for one in tried))
    before = [msgspec.structs.asdict(one) for one in engines]
    route = choose(request, engines, 100.0)
    assert choose(request, engines, 100.0) == route
    assert [msgspec.structs.asdict(one) for one in engines] == before
    able = [one for one in engines if one.ready and one not in tried]
    if route.prefill is not None:
        assert not request.is_begun
        assert route.prefill.role == "prefill"
        assert route.prefill in able
        assert route.decode.role == "decode"
        assert policies.may_pull(route.decode, route.prefill, 100.0)
        return
    able = [one for one in able if request.is_done_by(one)]
    assert (route.decode in able) if able else route.decode is None
    if route.decode is not None and not route.decode.health.takes(100.0):
        # The least bad one, when there is no other.
        assert all(one.health.is_tripped for one in able)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(100.0)


@pytest.fixture
def pool(clock: FakeClock) -> EnginePool:
    return EnginePool(clock)


def update(pool: EnginePool, *entries: Entry) -> None:
    pool.update(Registry(version=1, entries=list(entries)))


def pick(pool: EnginePool, role: Role, *, tried: Collection[EngineKey] = ()) -> Engine | None:
    """Have the pool choose one engine for all of a request, preferably of this role."""
    request = RoutingRequest(
        max_tokens=1 if role == "prefill" else None, is_begun=True, tried=frozenset(tried)
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


def test_the_speed_of_an_engine_is_that_of_its_prompts(clock: FakeClock, pool: EnginePool) -> None:
    update(pool, server("prefill-0"))
    (engine,) = pool.engines
    assert engine.tokens_per_s == 0.0

    def prompt() -> AbstractContextManager[Callable[[], None]]:
        return engine.working(clock, num_prompt_tokens=500, num_uncached=400)

    with prompt() as first, prompt() as second:
        assert engine.waiting_tokens(clock(), 100.0) == 800
        clock.now += 2.0
        assert engine.waiting_tokens(clock(), 100.0) == 600
        first()
        assert engine.waiting_tokens(clock(), 100.0) == 400
        clock.now += 2.0
        second()
    assert engine.tokens_per_s == pytest.approx(200.0)
    # One that ends without a token says nothing, and idle time does not count.
    clock.now += 60.0
    with prompt():
        clock.now += 60.0
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


def test_an_engine_over_hosts_counts_the_devices_of_all_and_names_them(pool: EnginePool) -> None:
    node = {"devices": ("cuda:0", "cuda:1"), "capabilities": Capabilities(kind="vllm")}
    first = server("prefill-0", host="node-0")
    second = rank("prefill-0", 2, 4, host="node-1")
    update(pool, *(msgspec.structs.replace(entry, **node) for entry in (second, first)))
    (engine,) = pool.engines
    assert (engine.ready, engine.place, len(engine.devices)) == (True, "node-0, node-1", 4)


def test_work_is_kept_over_updates_but_not_over_restarts(pool: EnginePool) -> None:
    update(pool, server("decode-0"), rank("decode-0"))
    (first,) = pool.engines
    first.max_model_len = 10
    with work(first, num_streams=1, num_prompt_tokens=7):
        update(pool, server("decode-0"), rank("decode-0"), server("decode-1"))
        assert pick(pool, "decode").name == "decode-1"
        update(pool, server("decode-0"), rank("decode-0", incarnation=2))
        (second,) = pool.engines
        assert second.key != first.key
        assert (second.num_streams, second.max_model_len) == (0, None)
    assert first.num_streams == 0


Action = tuple[Literal["start", "end", "fail", "tick"], int]


@given(st.lists(st.tuples(st.sampled_from(["start", "end", "fail", "tick"]), st.integers(0, 3))))
def test_no_engine_is_starved_or_overloaded(actions: list[Action]) -> None:
    clock = FakeClock(100.0)
    pool = EnginePool(clock)
    update(pool, *(server(f"decode-{index}") for index in range(3)))
    running: list[AbstractContextManager[None]] = []
    for action, number in actions:
        if action == "start":
            usable = [one for one in pool.engines if one.health.takes(clock())]
            tries = [one for one in usable if one.health.is_tripped]
            engine = pick(pool, "decode")
            assert engine in (tries or usable) or not usable
            among = tries or usable
            assert not among or engine.num_streams == min(one.num_streams for one in among)
            running.append(work(engine, num_streams=1, num_prompt_tokens=1))
            running[-1].__enter__()
        elif action == "end" and running:
            running.pop(number % len(running)).__exit__(None, None, None)
        elif action == "fail":
            pool.engines[number % 3].health.failed(pool.clock())
        else:
            clock.now += number
        assert sum(engine.num_streams for engine in pool.engines) == len(running)


def test_an_engine_that_is_held_is_given_work_when_released_or_replaced() -> None:
    pool = EnginePool(FakeClock(100.0))
    update(pool, server("prefill-0"), server("decode-0"))
    prefill = pool.engines[1]
    pool.hold(prefill, "draining")
    assert pick(pool, "prefill").name == "decode-0"
    # A registry that does not know of it changes nothing.
    update(pool, server("prefill-0"), server("decode-0"))
    assert pick(pool, "prefill").name == "decode-0"
    assert prefill.state == "draining"
    pool.release(prefill)
    assert pick(pool, "prefill").name == "prefill-0"
    pool.hold(prefill, "sleeping")
    update(pool, server("prefill-0", incarnation=2), server("decode-0"))
    assert pick(pool, "prefill").name == "prefill-0"


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
