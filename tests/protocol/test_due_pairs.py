"""Pairs that hand KV blocks to each other are bounded, and all of them where there are few."""

from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.protocol.control import MAX_PEERS, due_pairs

NAMES = st.integers(0, 30)


def engines(role: str, number: int) -> list[str]:
    return [f"{role}-{index}" for index in range(number)]


@given(NAMES, NAMES)
def test_pairs_are_bounded_and_reach_every_engine(num_prefill: int, num_decode: int) -> None:
    prefill, decode = engines("p", num_prefill), engines("d", num_decode)
    due = due_pairs(prefill, decode)
    assert len(due) <= MAX_PEERS * (num_prefill + num_decode)
    assert due <= {(first, second) for first in prefill for second in decode}
    for name in [*prefill, *decode]:
        others = num_decode if name in prefill else num_prefill
        assert sum(name in pair for pair in due) >= min(MAX_PEERS, others)


def test_an_engine_that_leaves_moves_few_pairs() -> None:
    prefill, decode = engines("p", 30), engines("d", 30)
    before = due_pairs(prefill, decode)
    after = due_pairs(prefill[1:], decode)
    kept = {pair for pair in before if pair[0] != "p-0"}
    assert kept <= after
    assert len(after - kept) <= 2 * MAX_PEERS


@given(st.integers(0, MAX_PEERS), NAMES)
def test_all_pairs_are_used_where_one_role_has_few_engines(few: int, many: int) -> None:
    prefill, decode = engines("p", few), engines("d", many)
    assert due_pairs(prefill, decode) == {(one, other) for one in prefill for other in decode}
