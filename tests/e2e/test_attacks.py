"""A short ``make attack``: real processes, attacks at all of their ports."""

from tests.attacks.__main__ import main


def test_a_short_attack_breaks_no_promise() -> None:
    assert main(["sockets", "fuzz", "kvfuzz", "--requests", "200"]) == 0
