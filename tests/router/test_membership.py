"""The router's view of its engines is a stream of registries."""

from __future__ import annotations

from pdlaunch.protocol.control import Registry
from pdlaunch.router.membership import AnnouncedMembership


async def test_a_reader_that_is_slow_gets_the_latest_version() -> None:
    membership = AnnouncedMembership()
    versions = membership.versions()
    membership.announce(Registry(version=1, entries=[]))
    assert (await anext(versions)).version == 1
    membership.announce(Registry(version=2, entries=[]))
    membership.announce(Registry(version=3, entries=[]))
    assert (await anext(versions)).version == 3
