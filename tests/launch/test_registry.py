"""A new version of the registry for every change; pairs are proven or missing."""

from __future__ import annotations

import msgspec

from pdlaunch.launch.engines.native import NativeEngine
from pdlaunch.launch.pairs import Pairs
from pdlaunch.launch.registry import next_registry
from pdlaunch.launch.state import Desired, Observed, Timing
from pdlaunch.protocol.control import PairReady, Registry
from tests.launch.fakes import make_plan, pair_ready

ENGINES = ("prefill-0", "decode-0")


def test_a_new_version_for_every_change_and_none_without() -> None:
    seen, wanted = Observed([], Pairs(make_plan(), NativeEngine()), 0.0), Desired(Timing())
    first = Registry(version=0, entries=[], serving=False)
    assert next_registry(first, wanted, seen) is first
    seen.was_ready = True
    second = next_registry(first, wanted, seen)
    assert (second.version, second.serving) == (1, True)
    assert next_registry(second, wanted, seen) is second
    seen.pairs.add(to_rank(0, num_peers=1))
    third = next_registry(second, wanted, seen)
    assert (third.version, third.pairs) == (2, [to_rank(0, num_peers=1)])


def to_rank(tp_rank: int, num_peers: int) -> PairReady:
    pair = pair_ready("decode-0/rank-0", f"prefill-0/rank-{tp_rank}", 0)
    return msgspec.structs.replace(pair, num_peers=num_peers)


def test_a_decode_rank_is_connected_with_its_last_pair() -> None:
    pairs = Pairs(make_plan(), NativeEngine())
    assert pairs.missing(ENGINES) == ["decode-0/rank-0 has no path to prefill-0"]
    pairs.add(to_rank(0, num_peers=1))
    assert pairs.missing(ENGINES) == []


def test_every_rank_of_the_prefill_engine_that_is_pulled_from_counts() -> None:
    plan = make_plan(tp_size=3)
    pairs = Pairs(plan, NativeEngine())
    for decode in ("decode-0/rank-1", "decode-0/rank-2"):
        pairs.add(pair_ready(decode, "prefill-0/rank-0", 0))
    pairs.add(to_rank(0, num_peers=3))
    pairs.fail("decode-0/rank-0", "prefill-0/rank-1", "the first READ failed")
    expected = "decode-0/rank-0 has a path to only 1 of 3 ranks of prefill-0: the first READ failed"
    assert pairs.missing(ENGINES) == [expected]
    pairs.add(to_rank(1, num_peers=3))
    assert pairs.missing(ENGINES) == [
        "decode-0/rank-0 has a path to only 2 of 3 ranks of prefill-0"
    ]
    pairs.add(to_rank(2, num_peers=3))
    assert pairs.missing(ENGINES) == []
    pairs.forget("prefill-0/rank-2")
    assert pairs.missing(ENGINES) != []
