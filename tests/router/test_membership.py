"""Which pairs are proven, and which engines may be used: pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.http.watch.canary import CanaryDied, Proof
from pdlaunch.protocol.due_pairs import Pair, due_pairs
from pdlaunch.router.membership import Results, judge

WRONG = CanaryDied("wrong tokens")
PROOF = Proof(seconds=0.1, num_bytes=1000, transfer_s=0.0)


def engines(role: str, number: int) -> list[str]:
    return [f"{role}-{index}" for index in range(number)]


@given(st.data())
def test_engines_that_are_used_have_no_failed_pair_and_wait_for_none_among_them(
    data: st.DataObject,
) -> None:
    prefill = engines("p", data.draw(st.integers(0, 5)))
    decode = engines("d", data.draw(st.integers(0, 5)))
    due = due_pairs(prefill, decode)
    drawn = st.sampled_from([PROOF, WRONG, None])
    drawn_results = {pair: data.draw(drawn) for pair in sorted(due)}
    results: dict[Pair, Proof | CanaryDied] = {
        pair: result for pair, result in drawn_results.items() if result is not None
    }
    ready, reasons = judge(prefill, decode, results, ready_before=())
    assert ready.isdisjoint(reasons)
    assert ready | set(reasons) == {*prefill, *decode}
    for pair in due:
        if ready.issuperset(pair):
            assert results.get(pair) is PROOF


@pytest.mark.parametrize("wrong", ["p-0", "p-1", "d-0", "d-2"])
def test_one_wrong_engine_does_not_drag_its_peers_along(wrong: str) -> None:
    prefill, decode = engines("p", 2), engines("d", 3)
    results: Results = {
        pair: WRONG if wrong in pair else PROOF for pair in due_pairs(prefill, decode)
    }
    _, reasons = judge(prefill, decode, results, ready_before=())
    assert set(reasons) == {wrong}
    assert reasons[wrong].endswith("wrong tokens")


def test_of_a_lone_pair_that_failed_the_prefill_engine_serves_alone() -> None:
    ready, reasons = judge(["p-0"], ["d-0"], {("p-0", "d-0"): WRONG}, ready_before=())
    assert ready == {"p-0"}
    assert reasons == {"d-0": "p-0 -> d-0: wrong tokens"}


def test_a_new_engine_waits_and_the_others_do_not() -> None:
    results: Results = {("p-0", "d-0"): PROOF}
    ready, reasons = judge(["p-0", "p-1"], ["d-0"], results, ready_before=("p-0", "d-0"))
    assert ready == {"p-0", "d-0"}
    assert reasons == {"p-1": "its canary with d-0 is due"}


def test_engines_in_use_stay_while_their_pair_is_proven_again() -> None:
    ready, _ = judge(["p-0"], ["d-0"], {}, ready_before=("p-0", "d-0"))
    assert ready == {"p-0", "d-0"}
