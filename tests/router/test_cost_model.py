"""Estimates of routes, and the policy that compares them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.protocol.control import Capabilities, PairReady
from pdlaunch.protocol.costs import MAX_SLOWDOWN, EngineCosts, EngineReport, StepCosts
from pdlaunch.router.answer_lengths import AnswerLengths
from pdlaunch.router.breaker import Breaker
from pdlaunch.router.cost_model import MAX_CORRECTION, Load, Work, estimate_alone, load_of
from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.router.engine import REPORT_LASTS_S, Engine
from pdlaunch.router.policy import LeastWork, NoIndex, Route, RoutingRequest
from pdlaunch.router.prefix_index import PrefixHashes
from tests.router.test_policy import engine

STEPS = StepCosts(step_s=0.005, stream_s=1e-5, context_s=1e-8, prompt_s=2e-5, attended_s=0.0)
NOW = 100.0
OPEN = Breaker(num_failures=1, is_tripped=True, open_until_at=NOW + 1)
HALF_OPEN = Breaker(num_failures=1, is_tripped=True, open_until_at=NOW)


def costs(role: str = "decode", **changes: object) -> EngineCosts:
    fields: dict[str, object] = {
        "steps": STEPS,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 8192,
        "block_size": 16,
        "num_kv_tokens": 400_000,
        "kv_bytes_per_token": 131_072,
        "max_slowdown": None if role == "both" else MAX_SLOWDOWN,
    }
    return EngineCosts(**(fields | changes))  # type: ignore[arg-type]


def costed(name: str, **fields: object) -> Engine:
    role = name.partition("-")[0]
    able = Capabilities(awaits_lease=True, resumes=True, gives_first_token=True, costs=costs(role))
    made = engine(name, **({"capabilities": able} | fields))
    made.progressed_at = NOW
    return made


def busy(name: str, num_streams: int = 0, unanswered_tokens: int = 0) -> Engine:
    return costed(
        name,
        num_streams=num_streams,
        context_tokens=num_streams * 512,
        unanswered_tokens=unanswered_tokens,
        num_works=bool(unanswered_tokens),
    )


def choose(
    engines: Sequence[Engine],
    policy: LeastCost | None = None,
    index: object = None,
    pairs: Sequence[PairReady] = (),
    **fields: object,
) -> Route:
    request = RoutingRequest(
        **({"hop": "prefill", "num_prompt_tokens": 512, "max_tokens": 256} | fields)  # type: ignore[arg-type]
    )
    return (policy or LeastCost()).choose(request, engines, pairs, index or NoIndex(), NOW)  # type: ignore[arg-type]


def load(one: Engine) -> Load:
    found = load_of(one, NOW)
    assert found is not None
    return found


# Estimates


def test_a_prompt_alone_on_an_idle_engine_takes_its_step() -> None:
    estimate = estimate_alone(
        load(costed("decode-0")), Work(num_prompt_tokens=1000, num_output_tokens=1), 0
    )
    assert estimate.first_token_s == pytest.approx(0.005 + 1000 * 2e-5)
    assert estimate.delay_s == 0
    known = estimate_alone(
        load(costed("decode-0")), Work(num_prompt_tokens=1000, num_output_tokens=1), 900
    )
    assert known.first_token_s == pytest.approx(0.005 + 100 * 2e-5)


def test_streams_are_delayed_by_the_prompt_and_the_prompt_by_their_steps() -> None:
    work = Work(num_prompt_tokens=1000, num_output_tokens=1)
    alone = estimate_alone(load(costed("decode-0")), work, 0)
    beside = estimate_alone(load(busy("decode-0", num_streams=20)), work, 0)
    assert beside.first_token_s > alone.first_token_s
    assert beside.delay_s == pytest.approx(20 * 1000 * 2e-5)
    # No step is more than twice as long as the streams' own.
    assert beside.itl_s <= MAX_SLOWDOWN * load(busy("decode-0", num_streams=20)).decode_s + 1e-9


def test_what_waits_is_what_was_sent_or_told_less_what_was_done_since() -> None:
    one = busy("prefill-0", unanswered_tokens=1000)
    assert one.queued_tokens(NOW, 1e-3) == 1000
    assert one.queued_tokens(NOW + 0.4, 1e-3) == pytest.approx(600)
    one.hear(EngineReport(2500, 3, 900, 10, costs()), NOW)
    assert one.queued_tokens(NOW + 0.5, 1e-3) == pytest.approx(2000)
    assert one.queued_tokens(NOW + 9, 1e-3) == 0
    assert one.streams(NOW) == (3, 900)
    assert one.streams(NOW + 2 * REPORT_LASTS_S) == (0, 0)


def test_costs_of_attention_alone_are_costs_too() -> None:
    """A fit on a busy machine may leave nothing for steps and tokens."""
    steps = StepCosts(step_s=0.0, stream_s=0.0, context_s=0.0, prompt_s=0.0, attended_s=1e-6)
    one = costed(
        "decode-0", unanswered_tokens=100, capabilities=Capabilities(costs=costs(steps=steps))
    )
    assert 0 <= load(one).queued_tokens <= 100


def test_prompts_count_until_their_first_token() -> None:
    one = costed("decode-0")
    with one.computing(100, lambda: NOW + 1):
        with one.computing(50, lambda: NOW + 2):
            assert (one.unanswered_tokens, one.progressed_at) == (150, NOW + 1)
        assert (one.unanswered_tokens, one.progressed_at) == (100, NOW + 2)
    assert one.unanswered_tokens == 0


def test_experience_corrects_an_estimate_within_bounds() -> None:
    one, work = costed("decode-0"), Work(num_prompt_tokens=1000, num_output_tokens=1)
    before = estimate_alone(load(one), work, 0)
    for _ in range(200):
        one.experience.observe((1.0, before.computed_s), 2 * before.computed_s)
    after = estimate_alone(load(one), work, 0)
    assert after.computed_s == before.computed_s
    assert after.first_token_s == pytest.approx(2 * before.computed_s, rel=0.1)
    for _ in range(5000):
        one.experience.observe((1.0, before.computed_s), 100 * before.computed_s)
    most = one.experience.coefficients[0] + MAX_CORRECTION * before.computed_s
    assert estimate_alone(load(one), work, 0).first_token_s <= most


def test_a_full_engine_makes_wait_for_a_seat() -> None:
    work = Work(num_prompt_tokens=10, num_output_tokens=100)
    room = estimate_alone(load(busy("decode-0", num_streams=63)), work, 0)
    full = estimate_alone(load(busy("decode-0", num_streams=64)), work, 0)
    assert full.first_token_s > room.first_token_s + 100 * load(busy("decode-0", 64)).decode_s / 70


# Choices


def test_streams_that_run_send_a_prompt_to_prefill() -> None:
    route = choose([busy("prefill-0"), busy("decode-0", num_streams=32)])
    assert route.name == "prefill-0->decode-0"
    assert (route.kind, route.reason) == ("pair", "least cost")


def test_a_burst_at_prefill_sends_a_prompt_to_idle_decode() -> None:
    route = choose([busy("prefill-0", unanswered_tokens=20_000), busy("decode-0", num_streams=2)])
    assert (route.kind, route.name, route.prefill) == ("decode", "decode-0", None)
    assert [estimate.kind for estimate in route.alternatives] == ["pair", "prefill"]


def test_an_idle_engine_of_both_roles_takes_what_a_busy_pair_would_delay() -> None:
    engines = [busy("prefill-0", unanswered_tokens=9000), busy("decode-0", 60), busy("both-0")]
    assert choose(engines).name == "both-0"


def test_a_burst_is_shared_by_prefill_and_decode() -> None:
    engines = [costed("prefill-0"), costed("decode-0")]
    kinds = []
    for _ in range(64):
        route = choose(engines)
        first = route.prefill or route.decode
        assert first is not None
        first.unanswered_tokens += 512
        kinds.append(route.kind)
    assert kinds.count("pair") >= 20
    assert kinds.count("decode") >= 20


def test_limits_come_before_costs() -> None:
    engines = [busy("prefill-0", unanswered_tokens=3000), busy("decode-0", num_streams=30)]
    assert choose(engines).kind == "pair"
    fast = choose(engines, LeastCost(max_ttft_s=0.05))
    assert fast.kind == "decode"
    steady = [busy("prefill-0", unanswered_tokens=200_000), busy("decode-0", num_streams=2)]
    assert choose(steady).kind == "decode"
    assert choose(steady, LeastCost(max_itl_s=0.006)).kind == "pair"
    assert choose(steady, LeastCost(max_itl_s=1e-4)).reason == "least excess of the limits"


class Known:
    """All of the prompt but 32 tokens is cached at one engine."""

    def __init__(self, name: str) -> None:
        self.name = name

    def num_cached_tokens(self, one: Engine, prefix: PrefixHashes) -> int:
        return 480 if one.name == self.name else 0


def test_the_next_turn_goes_where_the_chat_is() -> None:
    engines = [busy("prefill-0"), busy("decode-0", 8), busy("decode-1", 8)]
    assert choose(engines, index=Known("decode-1")).name == "decode-1"
    assert choose(engines, index=Known("prefill-0")).kind == "pair"


def test_pulls_over_a_slow_path_cost_their_time() -> None:
    def ready(speed: float) -> PairReady:
        return PairReady(
            local="decode-0/rank-0",
            peer="prefill-0/rank-0",
            peer_incarnation=1,
            seconds=1.0,
            path="nixl",
            gigabytes_per_s=speed,
        )

    engines = [busy("prefill-0"), busy("decode-0", num_streams=4)]
    assert choose(engines, pairs=[ready(300.0)]).kind == "pair"
    assert choose(engines, pairs=[ready(0.6)]).kind == "decode"


def test_a_path_is_as_slow_as_its_slowest_ranks() -> None:
    pairs = [
        PairReady(
            local=f"decode-0/rank-{rank}",
            peer=f"prefill-0/rank-{rank}",
            peer_incarnation=1,
            seconds=1.0,
            path="nixl",
            gigabytes_per_s=speed,
        )
        for rank, speed in enumerate((300.0, 0.6, 300.0))
    ]
    engines = [busy("prefill-0"), busy("decode-0", num_streams=4)]
    assert choose(engines, pairs=pairs[::2]).kind == "pair"
    assert choose(engines, pairs=pairs).kind == "decode"


def test_pairs_are_those_of_peers_whose_pulls_work() -> None:
    prefill, near, far = busy("prefill-0"), busy("decode-0", 32), busy("decode-1", 31)
    assert choose([prefill, near, far]).name == "prefill-0->decode-1"
    prefill.peers = near.peers = frozenset({"prefill-0", "decode-0"})
    far.peers = frozenset({"prefill-1"})
    assert choose([prefill, near, far]).name == "prefill-0->decode-0"
    near.pulls = {prefill.key: OPEN}
    assert choose([prefill, near, far]).kind != "pair"
    near.pulls = {prefill.key: HALF_OPEN}
    route = choose([prefill, near, far])
    assert (route.name, route.reason) == ("prefill-0->decode-0", "a try of what was left out")


@pytest.mark.parametrize("full", [{"max_num_seqs": 8}, {"num_kv_tokens": 4200}])
def test_a_decode_engine_without_room_is_waited_for_if_at_all(full: dict[str, int]) -> None:
    """Seats and the KV cache count, for the streams of pairs, too."""
    able = msgspec.structs.replace(busy("decode-0").capabilities, costs=costs(**full))
    crowded = busy("decode-0", num_streams=8)
    crowded.capabilities = able
    busier = busy("decode-1", num_streams=10)
    assert choose([busy("prefill-0"), busy("decode-0", 8), busier]).name.endswith("decode-0")
    route = choose([busy("prefill-0"), crowded, busier])
    assert route.name == "prefill-0->decode-1"
    alone = choose([crowded, busy("both-0", num_streams=10)])
    assert alone.name == "both-0"


def test_what_costs_cannot_decide_is_decided_by_work() -> None:
    unknown = engine("decode-0")
    for engines, fields in [
        ([costed("prefill-0"), unknown], {}),
        ([costed("prefill-0"), costed("decode-0")], {"is_suspect": True}),
        ([costed("prefill-0"), costed("decode-0")], {"tried": frozenset({("x", (1,), 0)})}),
        ([costed("prefill-0"), costed("decode-0")], {"max_tokens": 1}),
        ([costed("prefill-0"), costed("decode-0")], {"hop": "decode"}),
    ]:
        route = choose(engines, **fields)
        request = RoutingRequest(
            **({"hop": "prefill", "num_prompt_tokens": 512, "max_tokens": 256} | fields)
        )
        assert route == LeastWork().choose(request, engines, [], NoIndex(), NOW)
        assert route.kind == "least_work"


def test_engines_that_failed_a_moment_ago_are_left_alone() -> None:
    failed = costed("decode-0", breaker=OPEN)
    assert choose([costed("prefill-0"), failed, costed("decode-1")]).name.endswith("decode-1")


def test_who_has_told_no_costs_is_asked_now_and_then_so_that_it_does() -> None:
    """A router alone hears of costs with answers: beside pairs an engine of both roles is never
    the one with the least work.
    """
    policy, silent = LeastCost(), engine("both-0")
    engines = [costed("prefill-0"), costed("decode-0"), silent]
    routes = [choose(engines, policy) for _ in range(100)]
    tried = [number for number, route in enumerate(routes, 1) if route.decode is silent]
    assert tried == [32, 64, 96]
    assert {routes[number - 1].reason for number in tried} == {"a try of what has told no costs"}
    assert all(route.prefill is engines[0] for route in routes if route.decode is not silent)
    silent.hear(EngineReport(0, 0, 0, 999, costs("both")), NOW)
    assert choose(engines, policy).kind != "least_work"
    # Where nobody tells any, as engines of vLLM, nobody waits for costs.
    foreign = [engine("prefill-0"), engine("decode-0"), engine("both-0")]
    assert all(choose(foreign, policy).prefill is foreign[0] for _ in range(100))


def test_a_route_explains_itself() -> None:
    route = choose([busy("prefill-0"), busy("decode-0", 8), busy("both-0", 8)])
    assert route.explained.startswith("least cost: prefill-0->decode-0 first token ")
    told = re.findall(
        r"(\S+) first token [\d.]+ ms, all (\d+) ms, others \+([\d.]+) ms", route.explained
    )
    costs_ms = {name: float(total_ms) + float(delay_ms) for name, total_ms, delay_ms in told}
    assert costs_ms.keys() == {"prefill-0->decode-0", "decode-0", "both-0", "prefill-0"}
    assert costs_ms["prefill-0->decode-0"] == min(costs_ms.values())


ENGINES = st.lists(
    st.builds(
        costed,
        st.sampled_from(["prefill-0", "prefill-1", "decode-0", "decode-1", "both-0"]),
        ready=st.booleans(),
        num_streams=st.integers(0, 100),
        context_tokens=st.integers(0, 100_000),
        unanswered_tokens=st.integers(0, 100_000),
        breaker=st.sampled_from([Breaker(), OPEN, HALF_OPEN]),
        num_picks=st.integers(0, 3),
    ),
    max_size=5,
    unique_by=lambda one: one.name,
)


@given(ENGINES, st.integers(1, 10_000), st.integers(2, 1000), st.integers(1, 3))
def test_the_cheapest_route_is_taken_and_nothing_is_changed(
    engines: list[Engine], num_prompt_tokens: int, max_tokens: int, num_choices: int
) -> None:
    fields = {
        "num_prompt_tokens": num_prompt_tokens,
        "max_tokens": max_tokens,
        "num_choices": num_choices,
    }
    before = [(one.num_streams, one.unanswered_tokens, one.num_picks) for one in engines]
    route = choose(engines, **fields)
    assert choose(engines, **fields) == route
    assert [(one.num_streams, one.unanswered_tokens, one.num_picks) for one in engines] == before
    if route.estimate is None:
        return
    # Who wants a try comes first, whatever it costs.
    if not route.tries:
        assert all(route.estimate.cost_s <= other.cost_s for other in route.alternatives)
    taken = {*route.estimate.engines}
    assert not taken & route.left_out.keys()
    assert route.tries == {one.name for one in engines if one.breaker is HALF_OPEN} & taken
    for one in (route.prefill, route.decode, route.planned):
        assert one is None or (one.ready and one.breaker.takes(NOW))
    assert route.prefill is None or route.prefill.role == "prefill"
    assert route.prefill is not None or route.decode is not None


def test_streams_to_come_are_no_streams_yet() -> None:
    """A burst that was sent this instant delays nobody's tokens, and crowds all of them."""
    work = Work(num_prompt_tokens=512, num_output_tokens=256)
    coming = busy("decode-0", num_streams=32)
    coming.num_expected, coming.expected_tokens = 32, 32 * 512
    running = busy("decode-0", num_streams=32)
    assert load(coming).num_streams == 0
    assert load(coming).chunk_tokens == costs().max_num_batched_tokens
    there, here = estimate_alone(load(coming), work, 0), estimate_alone(load(running), work, 0)
    assert there.first_token_s < here.first_token_s
    assert there.delay_s > estimate_alone(load(busy("decode-0")), work, 0).delay_s


def test_streams_at_prefill_are_charged_for_the_prompts_that_they_will_meet() -> None:
    work = Work(num_prompt_tokens=512, num_output_tokens=256)
    one = load(busy("prefill-0"))
    assert estimate_alone(one, work, 0, exposure=0.5).total_s > 1.4 * (
        estimate_alone(one, work, 0).total_s
    )


def test_no_deadline_is_held_against_a_prompt_that_is_too_long() -> None:
    """Else its client would be told to come again, and not what is wrong."""
    engines = [busy("prefill-0"), busy("decode-0")]
    for one in engines:
        one.max_model_len = 8192
    asked = {"left_s": 1e-3, "expected_tokens": 2.0}
    assert choose(engines, num_prompt_tokens=8000, **asked).too_late is not None
    assert choose(engines, num_prompt_tokens=9000, **asked).too_late is None


def test_estimates_that_nothing_corrects_are_tried_now_and_then() -> None:
    """Else an idle deployment that takes itself for slow would refuse all deadlines for ever."""
    policy, engines = LeastCost(), [costed("prefill-0"), costed("decode-0")]
    routes = [choose(engines, policy, left_s=1e-3) for _ in range(100)]
    tries = {number: route for number, route in enumerate(routes, 1) if route.too_late is None}
    assert [*tries] == [32, 64, 96]
    assert {route.reason for route in tries.values()} == {
        "a try of estimates that nothing corrects"
    }
    pairs_only = LeastCost(prefers_pairs=True)
    routes = [choose(engines, pairs_only, left_s=1e-3) for _ in range(32)]
    assert [route.prefill is not None for route in routes] == [False] * 31 + [True]
    # What runs shows how long it takes: nothing is sent in vain.
    engines = [busy("prefill-0", unanswered_tokens=9000), busy("decode-0", num_streams=4)]
    assert all(choose(engines, policy, left_s=1e-3).too_late is not None for _ in range(100))


def test_a_deadline_is_held_against_short_answers() -> None:
    engines = [costed("prefill-0"), costed("decode-0")]
    usual_s = choose(engines).estimate.total_s  # type: ignore[union-attr]
    late = {"left_s": usual_s / 2, "expected_tokens": 256.0}
    for least, is_late in [(None, False), (1.0, False), (100.0, False), (250.0, True)]:
        found = choose(engines, least_tokens=least, **late).too_late
        assert (found is not None) == is_late
    # Nobody's answer is longer than its client allows.
    assert choose(engines, least_tokens=250.0, max_tokens=20, **late).too_late is None


def test_answers_that_are_all_alike_have_that_length_and_others_may_end_at_once() -> None:
    alike, varied = AnswerLengths(), AnswerLengths()
    assert (alike.usual_tokens, alike.least_tokens) == (None, None)
    for number in range(200):
        alike.add(256)
        varied.add((4000, 3, 200, 40)[number % 4])
        assert varied.least_tokens in (None, 1.0)
    assert (alike.usual_tokens, alike.least_tokens) == (256, 256)
    assert 500 < (varied.usual_tokens or 0) < 1700
    one = AnswerLengths()
    one.add(4000)
    assert (one.usual_tokens, one.least_tokens) == (4000, None)


def test_an_engine_that_says_it_is_slow_is_tried_all_the_same() -> None:
    """Else nobody would ever find out that it is not."""
    policy, dear = LeastCost(), msgspec.structs.replace(STEPS, stream_s=0.01, step_s=0.5)
    slow = costed("both-1")
    slow.capabilities = msgspec.structs.replace(slow.capabilities, costs=costs("both", steps=dear))
    routes = [choose([busy("both-0", num_streams=4), slow], policy) for _ in range(100)]
    reasons = {(route.name, route.reason) for route in routes}
    assert reasons == {
        ("both-0", "least cost"),
        ("both-1", "a try of what has rested for long"),
    }
    assert 2 <= sum(route.name == "both-1" for route in routes) <= 4
    alone = LeastCost()
    assert all(choose([costed("both-0"), slow], alone).name == "both-0" for _ in range(100))


@pytest.mark.parametrize("queued_tokens", [0, 64])
def test_a_short_prompt_beside_streams_takes_as_long_as_its_launches(queued_tokens: int) -> None:
    slow = costs(steps=msgspec.structs.replace(STEPS, launch_s=0.017))
    able = Capabilities(awaits_lease=True, resumes=True, gives_first_token=True, costs=slow)
    made = costed(
        "decode-0",
        capabilities=able,
        num_streams=8,
        context_tokens=4096,
        num_works=True,
        unanswered_tokens=queued_tokens,
    )
    load = load_of(made, NOW)
    assert load is not None
    assert load.prompt_s(64) == pytest.approx(0.017)
    # Prompts that wait are in the same step.
    longer_s = 64 * STEPS.prompt_s if queued_tokens else 0.017 - load.decode_s
    assert load.lengthens_s(64) == pytest.approx(longer_s)
    work = Work(num_prompt_tokens=64, num_output_tokens=8)
    assert estimate_alone(load, work, 0).itl_s == pytest.approx(0.017)
