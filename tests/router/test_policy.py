"""The routing policy is pure: it answers from its arguments alone, and changes none of them."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.protocol.control import Capabilities
from pdlaunch.router.breaker import Breaker
from pdlaunch.router.engine import Engine, Lender
from pdlaunch.router.policy import (
    MAX_QUEUED,
    LeastWork,
    NoIndex,
    Route,
    RoutingRequest,
    covers,
)

LENDER = Lender(engine_id="e", host="127.0.0.1", port=1, tp_size=1)


def engine(name: str, **fields: object) -> Engine:
    default = {
        "name": name,
        "processes": (1,),
        "url": f"http://{name}",
        "role": name.partition("-")[0],
        "capabilities": Capabilities(awaits_lease=True, resumes=True, gives_first_token=True),
        "ready": True,
        "state": "ready",
        "lender": LENDER,
    }
    return Engine(**(default | fields))


def choose(request: RoutingRequest, engines: list[Engine], now_at: float = 0.0) -> Route:
    return LeastWork().choose(request, engines, [], NoIndex(), now_at)


def prompt(**fields: object) -> RoutingRequest:
    return RoutingRequest(**({"hop": "prefill", "num_prompt_tokens": 100} | fields))


def test_decode_is_told_while_prefill_computes() -> None:
    prefill, decode = engine("prefill-0"), engine("decode-0")
    route = choose(prompt(), [prefill, decode])
    assert (route.prefill, route.decode) == (prefill, decode)
    assert str(route) == "prefill-0 -> decode-0: least work"


def test_decode_is_not_told_of_prompts_that_would_keep_it_waiting() -> None:
    decode = engine("decode-0")
    for request, fields in [
        (prompt(is_suspect=True), {}),
        (prompt(num_choices=2), {}),
        (prompt(), {"num_works": MAX_QUEUED + 1}),
        (prompt(), {"lender": None}),
        (prompt(), {"capabilities": Capabilities()}),
    ]:
        prefill = engine("prefill-0", **fields)
        route = choose(request, [prefill, decode])
        assert (route.prefill, route.decode) == (prefill, None)


def test_without_a_pair_the_reason_says_what_is_missing() -> None:
    prefill, decode = engine("prefill-0"), engine("decode-0")
    assert choose(prompt(), [prefill]).reason == "no decode engine is ready"
    assert choose(prompt(), [decode]).reason == "no prefill engine is ready"
    assert choose(prompt(max_tokens=1), [prefill, decode]).prefill is None
    alone = choose(prompt(hop="decode"), [prefill])
    assert (alone.decode, alone.reason) == (prefill, "no decode engine is ready")
    assert str(choose(prompt(hop="decode"), [])) == "no engine: no engine is ready"


def test_pairs_come_first_then_engines_of_both_roles() -> None:
    prefill, decode, both = engine("prefill-0"), engine("decode-0"), engine("both-0")
    route = choose(prompt(), [both, prefill, decode])
    assert (route.prefill, route.decode) == (prefill, decode)
    whole = prompt(hop="decode")
    alone = choose(whole, [prefill, decode, both])
    assert (alone.decode, alone.reason) == (both, "least work")
    # One that is not there, or has failed this prompt, leaves it to the others.
    assert choose(whole, [prefill, decode]).decode is decode
    tried = prompt(hop="decode", tried=frozenset({both.key}))
    assert choose(tried, [prefill, decode, both]).decode is decode


def test_what_prefill_has_computed_goes_to_decode_before_engines_of_both_roles() -> None:
    prefill, decode, both = engine("prefill-0"), engine("decode-0"), engine("both-0")
    computed = prompt(hop="decode", prefill="prefill-0")
    assert choose(computed, [both, prefill, decode]).decode is decode
    assert choose(computed, [both, prefill]).decode is both
    first_token = prompt(hop="decode", max_tokens=1)
    assert choose(first_token, [both, decode, prefill]).decode is prefill
    assert choose(first_token, [decode, both]).decode is both


def test_engines_of_both_roles_share_the_requests_by_their_work() -> None:
    busy, free = engine("both-0", num_streams=2), engine("both-1", num_streams=1)
    assert choose(prompt(), [busy, free]).prefill is None
    assert choose(prompt(hop="decode"), [busy, free]).decode is free


ENGINES = st.lists(
    st.builds(
        engine,
        st.sampled_from(["prefill-0", "prefill-1", "decode-0", "decode-1", "both-0"]),
        ready=st.booleans(),
        num_prompt_tokens=st.integers(0, 3),
        num_streams=st.integers(0, 3),
        num_works=st.integers(0, MAX_QUEUED + 1),
        num_picks=st.integers(0, 3),
        breaker=st.builds(
            Breaker,
            is_tripped=st.booleans(),
            num_failures=st.integers(0, 3),
            open_until_at=st.floats(0, 2),
        ),
        capabilities=st.builds(Capabilities, resumes=st.booleans(), awaits_lease=st.booleans()),
    ),
    max_size=4,
    unique_by=lambda one: one.name,
)
REQUESTS = st.builds(
    prompt,
    hop=st.sampled_from(["prefill", "decode"]),
    max_tokens=st.sampled_from([None, 1, 5]),
    num_choices=st.integers(1, 2),
    is_suspect=st.booleans(),
    needs=st.frozensets(st.sampled_from(["goes_on", "awaits_lease"])),
)


@given(REQUESTS, ENGINES, st.floats(0, 2), st.data())
def test_what_is_chosen_can_serve_and_nothing_is_changed(
    request: RoutingRequest, engines: list[Engine], now_at: float, data: st.DataObject
) -> None:
    tried = data.draw(st.frozensets(st.sampled_from(engines))) if engines else frozenset()
    request = msgspec.structs.replace(request, tried=frozenset(one.key for one in tried))
    before = [msgspec.structs.asdict(one) for one in engines]
    route = choose(request, engines, now_at)
    assert choose(request, engines, now_at) == route
    assert [msgspec.structs.asdict(one) for one in engines] == before
    if request.hop == "decode":
        able = [
            one
            for one in engines
            if one.ready and one not in tried and covers(one.capabilities, request.needs)
        ]
        assert route.prefill is None
        assert (route.decode in able) if able else route.decode is None
        return
    if route.prefill is None:
        assert route.decode is None
        return
    assert route.prefill.role == "prefill"
    assert route.prefill not in tried
    others = [
        one
        for one in engines
        if one.ready and one.role == "prefill" and one not in tried and one.breaker.takes(now_at)
    ]
    tries = [one for one in others if one.breaker.wants_try(now_at)]
    least = min(one.num_prompt_tokens for one in tries or others)
    assert route.prefill.num_prompt_tokens == least
    assert route.decode is None or (route.decode.role == "decode" and route.decode.ready)


def test_kv_blocks_go_to_peers_alone() -> None:
    """In large launches an engine shakes hands with some of the others."""
    prefill = engine("prefill-0", peers=frozenset({"decode-1"}))
    stranger = engine("decode-0", peers=frozenset({"prefill-1"}))
    peer = engine("decode-1", peers=frozenset({"prefill-0"}), num_streams=5)
    assert choose(prompt(), [prefill, stranger]).prefill is None
    assert choose(prompt(), [prefill, stranger, peer]).prefill is prefill
    computed = prompt(hop="decode", prefill="prefill-0")
    assert choose(computed, [prefill, stranger, peer]).decode is peer
    # Without a peer the prompt is computed again.
    assert choose(computed, [prefill, stranger]).decode is stranger


def test_decode_is_told_early_by_its_peers_alone() -> None:
    prefill = engine("prefill-0", peers=frozenset({"decode-1"}))
    stranger = engine("decode-0", peers=frozenset({"prefill-1"}))
    peer = engine("decode-1", peers=frozenset({"prefill-0"}), num_streams=5)
    assert choose(prompt(), [prefill, stranger, peer]).decode is peer
