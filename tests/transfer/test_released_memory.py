"""Closed objects release the KV cache without a garbage collection, which may be hours away."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.protocol.sockets import SecureContext
from pdlaunch.transfer.connectors.connector import Connector
from pdlaunch.transfer.connectors.file import FileConnector
from pdlaunch.transfer.connectors.nixl import NixlConnector
from pdlaunch.transfer.connectors.p2p import P2PConnector
from pdlaunch.transfer.connectors.paths import PathsConnector
from tests.faulty.transfers import FaultPlan, FaultyConnector
from tests.transfer.fakes import Fabric, FakeConnector
from tests.transfer.rank_process import pull
from tests.transfer.test_p2p import memory_of
from tests.transfer.test_pull_faults import History
from tests.transfer.test_thread import TIMEOUT_S, connected, pull_once, remote


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Disable garbage collection, and logging: pytest would keep logged errors, whose tracebacks
    reference all objects.
    """
    gc.disable()
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


def storage_of(tensor: torch.Tensor) -> StorageWeakRef:
    """A weak reference to the memory of a tensor, which views keep alive too."""
    return StorageWeakRef(tensor.untyped_storage())


def are_gone(*storages: StorageWeakRef) -> bool:
    return all(storage.expired() for storage in storages)


def test_a_transfer_thread_that_is_closed(context: SecureContext) -> None:
    """It releases the cache even if the engine still references the thread."""
    holder, puller = connected(context, Fabric())
    pull_once(holder, puller, "r")
    puller.transfer.submit([pull("unanswered", remote("none"), [3])])
    caches = [storage_of(rank.kv_cache) for rank in (holder, puller)]
    for rank in (puller, holder):
        rank.close()
        del rank.kv_cache
    assert are_gone(*caches)


class Anything:
    """A fake of NIXL: all methods accept any arguments and keep none."""

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


def test_a_history_of_faults() -> None:
    history = History(0)
    history.run()
    ranks = [history.world, *history.world.holders.values()]
    caches = [storage_of(rank.kv_cache) for rank in ranks]
    del ranks
    del history
    assert are_gone(*caches)
