from __future__ import annotations

from pdlaunch.protocol.control import PairReady
from pdlaunch.supervisor.registry import RegistryBook


def test_a_new_version_for_every_change_and_none_without() -> None:
    book = RegistryBook()
    assert not book.update([], serving=False)
    assert book.update([], serving=True)
    assert (book.current.version, book.current.serving) == (1, True)
    assert not book.update([], serving=True)


def test_a_proven_pair_is_a_change() -> None:
    book, pair = (
        RegistryBook(),
        PairReady(
            local="d",
            peer="p",
            peer_incarnation=1,
            seconds=0.1,
            path="p2p/memfd",
            gigabytes_per_s=9.0,
        ),
    )
    book.update([], serving=True)
    assert book.update([], [pair], serving=True)
    assert book.current.pairs == [pair]
    assert not book.update([], [pair], serving=True)
    assert book.update([], serving=True)
