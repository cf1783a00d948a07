"""What is closed lets go of the KV cache by itself: a full collection of cycles may be hours
away.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.memory.kv_memory import PrivateKVMemory
from pdlaunch.errors import TransferError
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.transfer.connectors.connector import Connector
from pdlaunch.transfer.connectors.faults import FaultPlan
from pdlaunch.transfer.connectors.faulty import FaultyConnector
from pdlaunch.transfer.connectors.file import FileConnector
from pdlaunch.transfer.connectors.nixl import NixlConnector
from pdlaunch.transfer.connectors.p2p import P2PConnector
from pdlaunch.transfer.connectors.paths import PathsConnector
from pdlaunch.transfer.leases import GRANT_LAG_S
from tests.e2e.waiting import await_true
from tests.transfer.fakes import Fabric, FakeConnector
from tests.transfer.pull_world import World
from tests.transfer.rank_process import cancel, grant, pull
from tests.transfer.test_p2p import memory_of
from tests.transfer.test_pull_faults import History
from tests.transfer.test_thread import (
    TIMEOUT_S,
    BrokenConnector,
    Rank,
    connected,
    pull_once,
    remote,
    tell,
)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """No collection helps, and pytest keeps no records of errors, whose tracebacks refer to
    everything.
    """
    gc.disable()
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


def storage_of(tensor: torch.Tensor) -> StorageWeakRef:
    """Of its memory, which views keep alive as well."""
    return StorageWeakRef(tensor.untyped_storage())


def are_gone(*storages: StorageWeakRef) -> bool:
    return all(storage.expired() for storage in storages)


def test_a_transfer_thread_that_is_closed(context: SecureContext) -> None:
    """Whoever still refers to it, as an engine may until its process ends."""
    holder, puller = connected(context, Fabric())
    pull_once(holder, puller, "r")
    puller.transfer.submit([pull("unanswered", remote("none"), [3])])
    caches = [storage_of(rank.kv_cache) for rank in (holder, puller)]
    for rank in (puller, holder):
        rank.close()
        del rank.kv_cache
    assert are_gone(*caches)


def test_a_transfer_thread_that_has_died(context: SecureContext) -> None:
    rank = Rank(context, "decode", Fabric(), connector=BrokenConnector("x", Fabric()))
    cache = storage_of(rank.kv_cache)
    del rank.kv_cache
    for _ in range(2):
        with pytest.raises(TransferError, match="no such backend"):
            rank.transfer.wait_started(TIMEOUT_S)
    rank.close()
    assert are_gone(cache)


def test_a_thread_with_a_read_that_may_still_write_keeps_its_memory(context) -> None:
    """The tensor goes with its owner, as always; what keeps the landing of the READ is the
    transfer thread.
    """
    fabric = Fabric(stalled=True)
    ranks = holder, puller = [Rank(context, role, fabric) for role in ("prefill", "decode")]
    tell(*ranks)
    await_true(lambda: fabric.reads, "the scratch is read", TIMEOUT_S)
    for rank in ranks:
        rank.close()
    assert puller.transfer._sides.has_pending_reads
    assert holder.transfer._sides is None


class Anything:
    """Stands in for NIXL: every method takes everything and keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., Anything]:
        return lambda *values, **options: Anything()


def p2p() -> P2PConnector:
    return P2PConnector("a", 1, host="here")


CONNECTORS: dict[str, Callable[[Path], Connector]] = {
    "file": lambda folder: FileConnector(
        KVTransferSettings(connector="file", file={"directory": str(folder)}), "a", 1
    ),
    "nixl": lambda _: NixlConnector("a", 1, load=lambda: (Anything(), Anything())),
    "p2p": lambda _: p2p(),
    "paths": lambda _: PathsConnector([FakeConnector("a#1", Fabric()), p2p()]),
    "faulty": lambda _: FaultyConnector(p2p(), FaultPlan(seed=1)),
}


@pytest.mark.parametrize("name", CONNECTORS)
def test_a_connector_that_is_closed(name: str, tmp_path: Path) -> None:
    connector, memory = CONNECTORS[name](tmp_path), memory_of("a")
    connector.open(memory)
    tensors = [storage_of(memory.kv.regions[0]), storage_of(memory.scratch)]
    del memory
    assert not are_gone(*tensors), "it keeps what it has registered"
    connector.close()
    assert are_gone(*tensors)
    assert connector.wait_unmapped(TIMEOUT_S)


def test_memory_that_cannot_be_shared_is_not_kept() -> None:
    connector, memory = p2p(), memory_of("a")
    cache = storage_of(memory.kv.regions[0])
    with pytest.raises(TransferError, match="this process alone"):
        connector.open(replace(memory, source=PrivateKVMemory()))
    del memory
    assert are_gone(cache)


FAULTS = ["refused", "failed", "wrong bytes", "lost", "cancelled", "unanswered"]


@pytest.mark.parametrize("fault", FAULTS)
def test_peers_and_pulls_of_any_end(fault: str) -> None:
    world = World()
    holder = world.connect()
    holder.holder.grant(grant("r", [4]))
    world.fabric.failing = fault == "failed"
    holder.channel.mute = fault == "unanswered"
    holder.kv_cache[4] += fault == "wrong bytes"
    world.pulls.start(pull("p", holder.remote("none" if fault == "refused" else "r"), [1]))
    if fault == "cancelled":
        world.pulls.cancel(cancel("p"))
    if fault == "lost":
        world.peers.update([])
    for _ in range(3):  # questions about a lease that never was wait, those about its end too
        world.turn(8)
        world.clock.now += GRANT_LAG_S
    assert [event.ok for event in world.events] == [False] * (fault != "unanswered")
    caches = [storage_of(rank.kv_cache) for rank in (world, *world.holders.values())]
    world.close()
    del world, holder
    assert are_gone(*caches)


def test_a_history_of_faults() -> None:
    history = History(0)
    history.run()
    caches = [
        storage_of(rank.kv_cache) for rank in (history.world, *history.world.holders.values())
    ]
    del history
    assert are_gone(*caches)
