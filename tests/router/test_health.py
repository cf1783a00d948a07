"""Engines and pairs that fail are left out, until a try shows that they are well."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.protocol.control import Registry
from pdlaunch.router.engine import Engine
from pdlaunch.router.health import MAX_OPEN_S, OPEN_S, TRY_LASTS_S
from pdlaunch.router.policy import RoutingRequest
from pdlaunch.router.pool import EnginePool
from tests.router.test_policy import HEALTH, engine, prompt
from tests.router.test_pool import Clock


class Pool(EnginePool):
    """Holds engines that no registry has named."""

    def __init__(self, clock: Clock, *engines: Engine) -> None:
        super().__init__(clock)
        self.update(Registry(version=1, entries=[]))
        self._engines = {one.name: one for one in engines}


def test_failed_pulls_leave_out_the_pair_and_no_engine() -> None:
    clock = Clock()
    prefill, decode = engine("prefill-0"), engine("decode-0")
    other = engine("decode-1", kv_tokens=900)
    pool = Pool(clock, prefill, decode, other)
    assert pool.route(prompt()).name == "prefill-0->decode-0"
    pool.pulled(prefill, decode, ok=False)
    route = pool.route(prompt())
    assert (route.name, route.left_out) == ("prefill-0->decode-1", {})
    clock.now_s += OPEN_S
    # The pair is tried once, and closed by a pull that comes through.
    assert pool.route(prompt()).name == "prefill-0->decode-0"
    assert pool.route(prompt()).name == "prefill-0->decode-1"
    for _ in range(8):
        pool.pulled(prefill, decode, ok=True)
    assert pool.pair_states() == {}


@given(
    st.lists(
        st.builds(engine, st.sampled_from(["decode-0", "decode-1", "decode-2"]), health=HEALTH),
        min_size=1,
        unique_by=lambda one: one.name,
    )
)
def test_none_is_left_out_for_ever(engines: list[Engine]) -> None:
    clock = Clock()
    pool = Pool(clock, *engines)
    sick = {one.name for one in engines if one.health.is_tripped}
    asked: set[str] = set()
    for _ in range(40):
        clock.now_s += 2.0
        for _ in range(3):
            (one,) = pool.route(RoutingRequest(is_begun=True)).engines
            asked.add(one.name)
            if one.name in sick:
                one.health.failed(clock())
    assert MAX_OPEN_S + TRY_LASTS_S < 80.0
    assert sick <= asked
