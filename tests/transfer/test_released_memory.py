"""What is closed lets go of the KV cache by itself: a full collection of cycles may be hours
away.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from pdlaunch.engine.memory.kv_memory import PrivateKVMemory
from pdlaunch.errors import TransferError
from pdlaunch.protocol.control import PairReady
from pdlaunch.protocol.sockets import SecureContext, new_launch_keys
from pdlaunch.transfer.connectors.connector import Connector, LocalMemory
from pdlaunch.transfer.connectors.faults import FaultPlan
from pdlaunch.transfer.connectors.faulty import FaultyConnector
from pdlaunch.transfer.connectors.file import FileConnector
from pdlaunch.transfer.connectors.nixl import NixlConnector
from pdlaunch.transfer.connectors.p2p import P2PConnector
from pdlaunch.transfer.connectors.paths import PathsConnector
from pdlaunch.transfer.leases import GRANT_LAG_S
from tests.transfer.fakes import Fabric, FakeConnector
from tests.transfer.pull_world import World
from tests.transfer.rank_process import cancel, grant, pull
from tests.transfer.test_p2p import memory_of
from tests.transfer.test_pull_faults import History
from tests.transfer.test_thread import Rank, remote


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


@pytest.fixture
def context() -> Iterator[SecureContext]:
    context = SecureContext(new_launch_keys())
    yield context
    context.close()


def storage_of(tensor: torch.Tensor) -> StorageWeakRef:
    """Of its memory, which views keep alive as well."""
    return StorageWeakRef(tensor.untyped_storage())


def kv_caches_of(world: World) -> list[StorageWeakRef]:
    return [storage_of(rank.kv_cache) for rank in (world, *world.holders.values())]


def are_gone(storages: list[StorageWeakRef]) -> bool:
    return all(storage.expired() for storage in storages)


def test_a_transfer_thread_that_is_closed(context: SecureContext) -> None:
    """Whoever still refers to it, as an engine may until its process ends."""
    fabric = Fabric()
    holder, puller = (
        Rank(context, role, FakeConnector(f"{role}-0/rank-0#1", fabric))
        for role in ("prefill", "decode")
    )
    puller.transfer.update_registry([holder.entry(), puller.entry()])
    assert isinstance(puller.reports.get(timeout=60), PairReady)
    holder.transfer.submit([grant("r", [4, 5])])
    puller.transfer.submit(
        [pull("p", remote("r"), [1, 2]), pull("unanswered", remote("none"), [3])]
    )
    assert puller.events()[0].ok
    caches = [storage_of(rank.kv_cache) for rank in (holder, puller)]
    for rank in (puller, holder):
        rank.transfer.close(timeout_s=60)
        del rank.kv_cache
    assert are_gone(caches)


def test_a_transfer_thread_that_has_died(context: SecureContext) -> None:
    class Broken(FakeConnector):
        def open(self, memory: LocalMemory) -> None:
            raise TransferError("no such backend")

    rank = Rank(context, "decode", Broken("decode-0/rank-0#1", Fabric()))
    cache = storage_of(rank.kv_cache)
    del rank.kv_cache
    for _ in range(2):
        with pytest.raises(TransferError, match="no such backend"):
            rank.transfer.wait_started(60)
    rank.transfer.close(timeout_s=60)
    assert are_gone([cache])


def test_a_thread_with_a_read_that_may_still_write_keeps_its_memory(context: SecureContext) -> None:
    """The tensor goes with its owner, as always; what keeps the landing of the READ is the
    transfer thread.
    """
    fabric = Fabric(stalled=True)
    holder, puller = (
        Rank(context, role, FakeConnector(f"{role}-0/rank-0#1", fabric))
        for role in ("prefill", "decode")
    )
    puller.transfer.update_registry([holder.entry(), puller.entry()])
    deadline_s = time.monotonic() + 60
    while not fabric.reads:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    for rank in (holder, puller):
        rank.transfer.close(timeout_s=60)
    assert puller.transfer._sides.has_pending_reads
    assert holder.transfer._sides is None


class Anything:
    """Stands in for NIXL: every method takes everything and keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., Anything]:
        return lambda *values, **options: Anything()


def connectors_of(folder: Path) -> dict[str, Connector]:
    file = FileConnector(
        "a",
        1,
        directory=str(folder),
        size_limit_bytes=1 << 30,
        num_sender_threads=1,
    )
    nixl = NixlConnector("a", 1, load=lambda: (Anything(), Anything()))
    p2p = P2PConnector("a", 1, host="here")
    paths = PathsConnector([FakeConnector("a#1", Fabric()), P2PConnector("a", 1, host="here")])
    return {
        "file": file,
        "nixl": nixl,
        "p2p": p2p,
        "paths": paths,
        "faulty": FaultyConnector(p2p, FaultPlan(seed=1)),
    }


@pytest.mark.parametrize("name", ["file", "nixl", "p2p", "paths", "faulty"])
def test_a_connector_that_is_closed(name: str, tmp_path: Path) -> None:
    connector, memory = connectors_of(tmp_path)[name], memory_of("a")
    connector.open(memory)
    tensors = [storage_of(memory.kv_cache), storage_of(memory.scratch)]
    del memory
    assert not are_gone(tensors), "it keeps what it has registered"
    connector.close()
    assert are_gone(tensors)
    assert connector.wait_unmapped(60)


def test_memory_that_cannot_be_shared_is_not_kept() -> None:
    connector, memory = (
        P2PConnector("a", 1, host="here"),
        memory_of("a"),
    )
    cache = storage_of(memory.kv_cache)
    with pytest.raises(TransferError, match="this process alone"):
        connector.open(replace(memory, source=PrivateKVMemory()))
    del memory
    assert are_gone([cache])


@pytest.mark.parametrize(
    "fault", ["refused", "failed", "wrong bytes", "lost", "cancelled", "unanswered"]
)
def test_peers_and_pulls_of_any_end(fault: str) -> None:
    world = World()
    holder = world.connect()
    holder.holder.grant(grant("r", [4]))
    match fault:
        case "failed":
            world.fabric.failing = True
        case "wrong bytes":
            holder.kv_cache[4] += 1
        case "unanswered":
            holder.channel.mute = True
    world.pulls.start(pull("p", holder.remote("none" if fault == "refused" else "r"), [1]))
    if fault == "cancelled":
        world.pulls.cancel(cancel("p"))
    if fault == "lost":
        world.peers.update([])
    for _ in range(3):  # questions about a lease that never was wait, those about its end too
        world.turn(8)
        world.clock.now += GRANT_LAG_S
    assert [event.ok for event in world.events] == [False] * (fault != "unanswered")
    caches = kv_caches_of(world)
    world.close()
    del world, holder
    assert are_gone(caches)


@pytest.mark.parametrize("seed", range(3))
def test_a_history_of_faults(seed: int) -> None:
    history = History(seed)
    history.run()
    caches = kv_caches_of(history.world)
    del history
    assert are_gone(caches)
