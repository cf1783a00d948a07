"""Streams may be at a prefill engine where prompts come in bursts, or seldom."""

from __future__ import annotations

import msgspec
import pytest

from pdlaunch.protocol.costs import EngineReport
from pdlaunch.router.cost_model import Load
from pdlaunch.router.cost_policy import LeastCost
from pdlaunch.router.exposure import Exposure
from tests.router.test_cost_model import busy, choose, costs, load

NUM_STREAMS = 16


def loads(stream_seconds: float, *, waiting: bool = False) -> list[Load]:
    prefill = busy("prefill-0", unanswered_tokens=512 if waiting else 0)
    decode = busy("decode-0", num_streams=NUM_STREAMS)
    told = EngineReport(0, NUM_STREAMS, 0, 0, costs(), stream_seconds=stream_seconds)
    decode.report = told
    return [load(prefill), load(decode)]


def exposure_after(seconds_between: float, *, in_bursts_of: int = 1, num_requests: int) -> float:
    exposure, now = Exposure(), 0.0
    for number in range(num_requests):
        is_first = number % in_bursts_of == 0
        now += seconds_between if is_first else 0.0
        exposure.arrives(512, loads(NUM_STREAMS * now, waiting=not is_first))
    return exposure.of_prefill(loads(NUM_STREAMS * now))


def test_at_first_a_pair_is_what_was_asked_for() -> None:
    assert Exposure().of_prefill(loads(0.0)) == pytest.approx(
        Exposure.WEIGHT * Exposure.FIRST_MET, rel=0.01
    )


def test_prompts_that_come_one_by_one_are_charged_for() -> None:
    """20 a second: each makes a token late, of the 200 that each stream gets."""
    charged = exposure_after(0.05, num_requests=400)
    prompt_s = costs().steps.tokens_s(512)
    assert charged == pytest.approx(Exposure.WEIGHT * 20 * prompt_s, rel=0.1)


@pytest.mark.parametrize(
    ("seconds_between", "in_bursts_of"), [(2.0, 40), (1.0, 1)], ids=["bursts", "seldom"]
)
def test_bursts_and_what_comes_seldom_are_not(seconds_between: float, in_bursts_of: int) -> None:
    assert exposure_after(seconds_between, in_bursts_of=in_bursts_of, num_requests=400) == 0.0


def test_prompts_that_are_refused_meet_no_streams() -> None:
    """However many come with deadlines that cannot be met."""
    policy = LeastCost()
    engines = [busy("prefill-0"), busy("decode-0", num_streams=NUM_STREAMS)]
    before = policy._exposure.of_prefill(loads(0.0))
    assert all(choose(engines, policy, left_s=1e-4).too_late is not None for _ in range(200))
    assert policy._exposure.of_prefill(loads(0.0)) == pytest.approx(before)
    for _ in range(20):
        choose(engines, policy)
    assert policy._exposure.of_prefill(loads(0.0)) > 1.2 * before


def test_without_a_prefill_engine_there_is_nothing_to_charge() -> None:
    decode = [one for one in loads(0.0) if one.engine.role == "decode"]
    assert Exposure().of_prefill(decode) == 0.0


def test_where_no_stream_ever_lasts_prompts_meet_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exposure, "FORGETS", 0.5)
    exposure, idle = Exposure(), [load(busy("prefill-0")), load(busy("decode-0"))]
    for _ in range(1200):
        exposure.arrives(512, idle)
    assert exposure.of_prefill(idle) == 0.0


def test_many_engines_share_the_prompts() -> None:
    """What one prefill engine is charged for, four share."""
    exposure = Exposure()
    one = loads(0.0)
    three = [
        msgspec.structs.replace(one[0], engine=busy(f"prefill-{number}")) for number in (1, 2, 3)
    ]
    assert exposure.of_prefill([*one, *three]) == 0.0
    assert exposure.of_prefill(one) > 0.0
