"""Smoke takes two answers for the same when they should be, and only then."""

from __future__ import annotations

import pytest

from pdlaunch.cli.smoke import SMOKE_LOGPROB_TOLERANCE, _equal
from pdlaunch.errors import PdlaunchError

ALONE = [(105, -0.5), (106, -1.0), (107, -2.0)]
NEAR = [(token, logprob + SMOKE_LOGPROB_TOLERANCE / 2) for token, logprob in ALONE]
FAR = [(105, -0.5), (106, -1.0 - 2 * SMOKE_LOGPROB_TOLERANCE), (107, -2.0)]
FORKED = [(105, -0.5), (108, -1.1), (9, -9.0)]


@pytest.mark.parametrize(
    ("pair", "exact"), [(ALONE, True), (NEAR, True), (NEAR, False), (FORKED, False)]
)
def test_equal(pair: list[tuple[int, float]], exact: bool) -> None:
    _equal(pair, ALONE, exact=exact)


@pytest.mark.parametrize(
    ("pair", "exact", "reason"),
    [
        (FORKED, True, "tokens differ"),
        (ALONE[:2], True, "one answer is longer"),
        (FAR, False, "logprobs differ"),
        (ALONE[:2], False, "one answer is longer"),
        ([], False, "one answer is longer"),
        ([*ALONE, (108, -1.0)], False, "one answer is longer"),
    ],
)
def test_different(pair: list[tuple[int, float]], exact: bool, reason: str) -> None:
    with pytest.raises(PdlaunchError, match=reason):
        _equal(pair, ALONE, exact=exact)
