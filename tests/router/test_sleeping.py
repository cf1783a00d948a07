"""Engines that sleep, or drain before it, get no work."""

from __future__ import annotations

import pytest

from pdlaunch.router.pool import EnginePool
from tests.router.test_pool import Clock, named, pick, rank, server, update


@pytest.mark.parametrize("state", ["draining", "sleeping"])
def test_work_goes_elsewhere_and_comes_back(state: str) -> None:
    pool = EnginePool(Clock())
    update(
        pool,
        server("prefill-0", state=state),
        rank("prefill-0"),
        server("decode-0"),
        rank("decode-0"),
    )
    assert named(pick(pool, "prefill")) == "decode-0"
    assert {engine.name: engine.state for engine in pool.engines} == {
        "prefill-0": state,
        "decode-0": "ready",
    }
    update(pool, server("prefill-0"), rank("prefill-0"), server("decode-0"), rank("decode-0"))
    assert named(pick(pool, "prefill")) == "prefill-0"


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
