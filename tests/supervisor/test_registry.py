from __future__ import annotations

from pdlaunch.supervisor.registry import RegistryBook


def test_a_new_version_for_every_change_and_none_without() -> None:
    book = RegistryBook()
    assert not book.update([], serving=False)
    assert book.update([], serving=True)
    assert (book.current.version, book.current.serving) == (1, True)
    assert not book.update([], serving=True)
