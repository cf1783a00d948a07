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


def test_a_sleeping_rank_is_enough() -> None:
    pool = EnginePool(Clock())
    update(pool, server("prefill-0"), rank("prefill-0", state="sleeping"))
    assert pick(pool, "prefill") is None
