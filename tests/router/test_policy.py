"""The routing policy is pure: it answers from its arguments alone, and changes none of them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.protocol.control import Capabilities
from pdlaunch.protocol.process.bootstrap import RoutingLimits
from pdlaunch.router import policy
from pdlaunch.router.engine import Engine, EngineHealth
from pdlaunch.router.policy import SHORT_TOKENS, Route, RoutingRequest
from pdlaunch.router.prefix_index import ServedPrefixes, hash_prefix

CPU = frozenset({"cpu"})


def engine(name: str, **fields: object) -> Engine:
    default = {
        "name": name,
        "processes": (1,),
        "url": f"http://{name}",
        "role": name.partition("-")[0],
        "capabilities": Capabilities(),
        "ready": True,
        "state": "ready",
        "devices": CPU,
    }
    return Engine(**(default | fields))


def choose(
    request: RoutingRequest,
    engines: list[Engine],
    now_at: float = 0.0,
    *,
    index: ServedPrefixes | None = None,
    **limits: object,
) -> Route:
    return policy.choose(
        request, engines, index or ServedPrefixes(), now_at, RoutingLimits(**limits)
    )


def prompt(**fields: object) -> RoutingRequest:
    return RoutingRequest(**({"num_prompt_tokens": 512} | fields))


def speed(tokens_per_s: float) -> dict[str, float]:
    return {"computed_tokens": tokens_per_s, "computing_s": 1.0}


def test_without_a_pair_the_reason_says_what_is_missing() -> None:
    prefill, decode = engine("prefill-0"), engine("decode-0")
    for engines, reason in (
        ([prefill], "no decode engine is ready"),
        ([decode], "no prefill engine is ready"),
        ([engine("prefill-0", peers=frozenset({"decode-1"})), proofless("decode-0")],
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


def proofless(name: str, **fields: object) -> Engine:
    return engine(name, capabilities=Capabilities(kind="vllm"), **fields)


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
    prefill = engine("prefill-0", peers=frozenset({"decode-1"}))
    stranger = engine("decode-0", peers=frozenset({"prefill-1"}))
    peer = engine("decode-1", peers=frozenset({"prefill-0"}), kv_tokens=5000)
    assert choose(prompt(), [prefill, stranger]).prefill is None
    assert choose(prompt(), [prefill, stranger, peer]).decode is peer
    computed = prompt(is_begun=True, holder=prefill)
    assert choose(computed, [prefill, stranger, peer]).decode is peer
    # Without a peer the prompt is computed again.
    assert choose(computed, [prefill, stranger]).decode is stranger


def test_blocks_that_nobody_verifies_go_over_proven_pairs_alone() -> None:
    prefill = proofless("prefill-0")
    unproven, proven = proofless("decode-0"), proofless("decode-1", proofs={"prefill-0": 1})
    assert choose(prompt(), [prefill, unproven]).prefill is None
    assert choose(prompt(), [prefill, unproven, proven]).decode is proven
    restarted = proofless("prefill-0", processes=(2,))
    assert choose(prompt(), [restarted, proven]).prefill is None


def test_the_least_loaded_engines_are_chosen() -> None:
    busy = engine("prefill-0", unanswered_tokens=1000)
    free, full, empty = engine("prefill-1"), engine("decode-0", kv_tokens=900), engine("decode-1")
    route = choose(prompt(), [busy, free, full, empty])
    assert (route.prefill, route.decode) == (free, empty)
    # Time has passed in which it has computed what waited.
    fast = engine("prefill-0", unanswered_tokens=1000, **speed(2000))
    slow = engine("prefill-1", unanswered_tokens=600, **speed(1000))
    assert choose(prompt(), [fast, slow, empty], 0.4).prefill is fast


def test_a_prompt_goes_where_its_prefix_is_cached() -> None:
    index, prefix = ServedPrefixes(), hash_prefix(b"x" * 2048, "")
    first, second, decode = engine("prefill-0"), engine("prefill-1"), engine("decode-0")
    index.served(second, prefix, 512, 0)
    request = prompt(prefix=prefix)
    assert choose(request, [first, second, decode], index=index).prefill is second
    # With the answers of earlier turns decode has nearly all of it.
    index.served(decode, prefix, 510, 0)
    route = choose(request, [first, decode], index=index)
    assert (route.prefill, route.decode) == (None, decode)
    assert route.reason == "little is left to compute"


def test_short_prompts_and_long_queues_are_computed_where_they_are_decoded() -> None:
    prefill, decode = engine("prefill-0"), engine("decode-0")
    assert choose(prompt(num_prompt_tokens=SHORT_TOKENS), [prefill, decode]).kind == "decode"
    assert choose(prompt(num_prompt_tokens=SHORT_TOKENS + 1), [prefill, decode]).kind == "pair"
    waits = engine("prefill-0", unanswered_tokens=1024)
    assert choose(prompt(), [waits, decode]).reason == "the prefill queue is longer"
    # Not if as much waits at decode, nor with many streams there.
    assert choose(prompt(), [waits, engine("decode-0", unanswered_tokens=900)]).kind == "pair"
    assert choose(prompt(), [waits, engine("decode-0", kv_tokens=30_000)]).kind == "pair"


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
    # Where nobody has told the devices, those on one host may share.
    assert kind([], [], "a") == "pair"
    assert kind([], ["a/cuda:1"], "a") == "pair"
    assert kind([], []) == "decode"


def test_limits_bound_what_is_computed_beside_streams() -> None:
    waits = engine("prefill-0", unanswered_tokens=3000, **speed(1000))
    decode = engine("decode-0", num_streams=1, **speed(1000))
    assert choose(prompt(), [waits, decode]).kind == "decode"
    assert choose(prompt(), [waits, decode], max_itl_s=0.5).kind == "pair"
    assert choose(prompt(), [waits, decode], max_itl_s=0.6).kind == "decode"
    decode.num_streams = 0
    assert choose(prompt(), [waits, decode], max_itl_s=0.5).kind == "decode"
    short = engine("prefill-0", unanswered_tokens=200, **speed(1000))
    assert choose(prompt(), [short, decode]).kind == "pair"
    route = choose(prompt(), [short, decode], max_ttft_s=0.6)
    assert (route.kind, route.reason) == ("decode", "keeps max_ttft_ms")


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
        num_picks=st.integers(0, 3),
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
    must_go_on=st.booleans(),
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
        assert route.decode is not None
        assert route.decode.role == "decode"
        assert policy.may_pull(route.decode, route.prefill, 100.0)
        return
    able = [one for one in able if request.is_done_by(one)]
    assert (route.decode in able) if able else route.decode is None
    if route.decode is not None and not route.decode.health.takes(100.0):
        # The least bad one, when there is no other.
        assert all(one.health.is_tripped for one in able)
