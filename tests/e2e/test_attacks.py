"""A short ``make attack``: real processes, attacks at all of their ports."""

import pytest

from tests.attacks.__main__ import main


@pytest.mark.e2e_long
def test_a_short_attack_breaks_no_promise() -> None:
    assert main(["sockets", "fuzz", "kvfuzz", "--requests", "200"]) == 0
