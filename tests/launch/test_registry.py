"""Every process is told the registry's versions; pairs are proven or missing."""

from __future__ import annotations

import msgspec

from pdlaunch.launch.engines.native import NativeEngine
from pdlaunch.launch.registry import Pairs, RegistryVersions
from pdlaunch.protocol.control import PairReady
from tests.launch.fakes import make_plan, pair_ready


def test_a_new_version_for_every_change_and_none_without() -> None:
    versions = RegistryVersions()
    assert not versions.update([], serving=False)
    assert versions.update([], serving=True)
    assert (versions.current.version, versions.current.serving) == (1, True)
    assert not versions.update([], serving=True)


def test_a_proven_pair_is_a_change() -> None:
    versions, pair = (
        RegistryVersions(),
        PairReady(
            local="d",
            peer="p",
            peer_incarnation=1,
            seconds=0.1,
            path="p2p/memfd",
            gigabytes_per_s=9.0,
        ),
    )
    versions.update([], serving=True)
    assert versions.update([], [pair], serving=True)
    assert versions.current.pairs == [pair]
    assert not versions.update([], [pair], serving=True)
    assert versions.update([], serving=True)


def to_rank(tp_rank: int, num_peers: int) -> PairReady:
    pair = pair_ready("decode-0/rank-0", f"prefill-0/rank-{tp_rank}", 0)
    return msgspec.structs.replace(pair, num_peers=num_peers)


def test_a_decode_rank_is_connected_with_its_last_pair() -> None:
    pairs = Pairs(make_plan(), NativeEngine())
    assert pairs.missing() == ["decode-0/rank-0 has no path to prefill-0"]
    pairs.add(to_rank(0, num_peers=1))
    assert pairs.missing() == []


def test_every_rank_of_the_prefill_engine_that_is_pulled_from_counts() -> None:
    plan = make_plan(tp_size=3)
    pairs = Pairs(plan, NativeEngine())
    for decode in ("decode-0/rank-1", "decode-0/rank-2"):
        pairs.add(pair_ready(decode, "prefill-0/rank-0", 0))
    pairs.add(to_rank(0, num_peers=3))
    pairs.fail("decode-0/rank-0", "prefill-0/rank-1", "the first READ failed")
    expected = "decode-0/rank-0 has a path to only 1 of 3 ranks of prefill-0: the first READ failed"
    assert pairs.missing() == [expected]
    pairs.add(to_rank(1, num_peers=3))
    assert pairs.missing() == ["decode-0/rank-0 has a path to only 2 of 3 ranks of prefill-0"]
    pairs.add(to_rank(2, num_peers=3))
    assert pairs.missing() == []
    pairs.forget("prefill-0/rank-2")
    assert pairs.missing() != []
