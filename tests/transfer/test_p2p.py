"""The P2P connector on a CPU, holder and puller in one process, and its choice beside another
connector.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
import torch

from pdlaunch.engine.memory.kv_memory import HostKVMemory, PrivateKVMemory
from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import Geometry
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    PeerAgent,
    Read,
)
from pdlaunch.transfer.connectors.p2p import P2PConnector
from pdlaunch.transfer.connectors.paths import PathsConnector
from pdlaunch.transfer.connectors.piece_copies import HostCopier
from pdlaunch.transfer.connectors.scratch import write_pattern
from pdlaunch.transfer.handshake import geometry_of
from tests.engine.memory.open_files import num_open_fds
from tests.transfer.fakes import Fabric, FakeConnector, layout_of, random_cache

TIMEOUT_S = 60.0
NUM_BLOCKS = 8
SCRATCH_BYTES = 4 << 20


@dataclass
class Rank:
    connector: Connector
    memory: LocalMemory
    first_kv_head: int = 0

    @property
    def geometry(self) -> Geometry:
        return geometry_of(self.memory, self.first_kv_head)

    def add(self, peer: Rank) -> Connection:
        return self.connector.connect(peer.card())

    def card(self, **changes: Any) -> PeerAgent:
        """What a peer hears of this rank."""
        connector = self.connector
        card = PeerAgent(connector.agent_name, connector.agent_metadata(), self.geometry)
        return replace(card, **changes)

    def unmapped(self, timeout_s: float = TIMEOUT_S) -> bool:
        return self.connector.wait_unmapped(timeout_s)


def memory_of(name: str, *, num_heads: int = 3) -> LocalMemory:
    source, layout = HostKVMemory(), layout_of(num_heads)
    kv_cache = (
        source.zeros(NUM_BLOCKS * layout.block_bytes)
        .view(torch.float32)
        .view(NUM_BLOCKS, *layout.block_shape())
    )
    kv_cache.copy_(random_cache(layout, NUM_BLOCKS, sum(name.encode())))
    scratch = source.zeros(SCRATCH_BYTES)
    write_pattern(scratch, f"{name}#1")
    return LocalMemory(kv_cache, scratch, layout, source)


def p2p(name: str, **options: Any) -> P2PConnector:
    return P2PConnector(name, 1, **{"host": "here"} | options)


def open_rank(name: str, *, num_heads: int = 3, **options: Any) -> Rank:
    rank = Rank(p2p(name, **options), memory_of(name, num_heads=num_heads))
    rank.connector.open(rank.memory)
    return rank


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    gc.collect()  # what other tests have left to it
    before = num_open_fds()
    yield
    for thread in [thread for thread in threading.enumerate() if thread.name == "fd-server"]:
        thread.join(TIMEOUT_S)
    gc.collect()
    assert num_open_fds() == before


@pytest.fixture
def ranks() -> Iterator[Callable[..., Rank]]:
    """Opens ranks; those that are left open are closed."""
    opened: list[Rank] = []

    def open_one(name: str, **options: Any) -> Rank:
        opened.append(open_rank(name, **options))
        return opened[-1]

    yield open_one
    for rank in opened:
        rank.connector.close()
        assert rank.unmapped()
    opened.clear()  # pytest keeps the function above


def await_end(begun: Read) -> str:
    deadline_s = time.monotonic() + TIMEOUT_S
    while (state := begun.poll()) == "pending" and time.monotonic() < deadline_s:
        time.sleep(0.001)
    begun.release()
    return state


def read(
    peer: Connection,
    local: list[int],
    remote: list[int],
    here: range = range(3),
    there: range = range(3),
) -> str:
    return await_end(peer.read(BlockRead(local, remote, here, there)))


def test_blocks_and_heads_arrive_where_they_belong(ranks: Callable[..., Rank]) -> None:
    one, two = ranks("a"), ranks("b", num_heads=1)
    peer = one.add(two)
    expected = one.memory.kv_cache.clone()
    expected[[6, 2, 3], 1] = two.memory.kv_cache[[1, 4, 5], 0]
    assert read(peer, [6, 2, 3], [1, 4, 5], range(1, 2), range(0, 1)) == "done"
    assert torch.equal(one.memory.kv_cache, expected)
    back = two.add(one)
    assert read(back, [0], [7], range(0, 1), range(2, 3)) == "done"
    assert torch.equal(two.memory.kv_cache[0, 0], one.memory.kv_cache[7, 2])
    peer.close()
    back.close()


def test_memory_is_unmapped_with_its_peer_and_mapped_anew_after_a_sleep(
    ranks: Callable[..., Rank],
) -> None:
    puller, holder = ranks("a"), ranks("b")
    peer, card = puller.add(holder), holder.card()
    holder.connector.close()
    assert not holder.unmapped(0)
    assert read(peer, [0], [1]) == "done", "what is mapped stays so until it is removed"
    peer.close()
    assert holder.unmapped()
    with pytest.raises(TransferError, match="no memory was handed over"):
        puller.connector.connect(card)
    holder.connector.open(holder.memory)
    again = puller.add(holder)
    assert read(again, [3], [4]) == "done"
    assert torch.equal(puller.memory.kv_cache[3], holder.memory.kv_cache[4])
    again.close()


def test_a_read_that_is_pending_keeps_its_own_thread_alone(ranks: Callable[..., Rank]) -> None:
    going_on = threading.Event()
    copier = HostCopier(lambda *_: going_on.wait(TIMEOUT_S))
    puller, holder = ranks("a", new_copiers=lambda memory: [copier]), ranks("b")
    peer = puller.add(holder)
    begun = peer.read(BlockRead([0], [1], range(3), range(3)))
    assert begun.poll() == "pending"
    going_on.set()
    assert await_end(begun) == "done"
    peer.close()


def test_blocks_that_the_peer_does_not_have_are_refused(ranks: Callable[..., Rank]) -> None:
    puller, holder = ranks("a"), ranks("b")
    peer = puller.add(holder)
    for block_id in (-1, NUM_BLOCKS):
        with pytest.raises(TransferError, match="b#1 has 8 blocks"):
            peer.read(BlockRead([0], [block_id], range(3), range(3)))
    peer.close()


def test_a_peer_of_another_host_or_with_other_sizes_is_refused_and_leaves_nothing_open(
    ranks: Callable[..., Rank],
) -> None:
    puller, holder = ranks("a"), ranks("b")
    before = num_open_fds()
    metadata = holder.connector.agent_metadata()
    with pytest.raises(TransferError, match="metadata of agent b#1 cannot be read"):
        puller.connector.connect(holder.card(metadata=b"nonsense"))
    for changes in ({"num_blocks": 9}, {"scratch_bytes": 1}):
        card = holder.card(geometry=msgspec.structs.replace(holder.geometry, **changes))
        with pytest.raises(TransferError, match="bytes are shared"):
            puller.connector.connect(card)
    card = msgspec.msgpack.decode(metadata)
    wrong = msgspec.msgpack.encode(card | {"kv_cache": card["kv_cache"] | {"offset_bytes": 4096}})
    with pytest.raises(TransferError, match=r"cannot be mapped: .* not within"):
        puller.connector.connect(holder.card(metadata=wrong))
    assert num_open_fds() <= before + 1, (
        "the holder may be about to close its end of the last connection"
    )
    for host in ("elsewhere", ""):
        stranger = ranks(f"c{host}", host=host)
        with pytest.raises(TransferError, match="not on this host"):
            puller.add(stranger)
        with pytest.raises(TransferError, match="not on this host"):
            stranger.add(puller if host else stranger)


def test_memory_that_cannot_be_shared_says_so() -> None:
    memory = replace(memory_of("a"), source=PrivateKVMemory())
    with pytest.raises(TransferError, match=r"a#1 cannot share its memory: .* this process alone"):
        p2p("a").open(memory)
    half = replace(memory_of("a"), scratch=torch.zeros(SCRATCH_BYTES, dtype=torch.uint8))
    with pytest.raises(TransferError, match="was not made for sharing"):
        p2p("a").open(half)


def test_a_connector_that_cannot_copy_closes_what_it_has_opened() -> None:
    def refuse(memory: LocalMemory) -> list[HostCopier]:
        raise TransferError("nothing to copy with")

    with pytest.raises(TransferError, match="nothing to copy with"):
        p2p("a", new_copiers=refuse).open(memory_of("a"))


# Beside another connector


@dataclass
class Both:
    paths: PathsConnector
    fake: FakeConnector
    rank: Rank


@pytest.fixture
def both() -> Iterator[Callable[..., Both]]:
    """Ranks with a fake connector for NIXL's part, and P2P."""
    opened: list[Both] = []
    fabric = Fabric()

    def open_one(name: str, source: Any = None, **options: Any) -> Both:
        memory = memory_of(name)
        fake = FakeConnector(f"{name}#1", fabric)
        paths = PathsConnector([fake, p2p(name, **options)])
        rank = Rank(paths, memory if source is None else replace(memory, source=source))
        paths.open(rank.memory)
        opened.append(Both(paths, fake, rank))
        return opened[-1]

    yield open_one
    for found in opened:
        found.paths.close()
        assert found.rank.unmapped()
    opened.clear()
    fabric.agents.clear()
    fabric.reads.clear()


def test_the_path_that_is_used_carries_the_reads(
    both: Callable[..., Both],
) -> None:
    puller, holder = both("a"), both("b")
    assert puller.paths.name == "fake+p2p"
    peer = puller.rank.add(holder.rank)
    assert peer.paths() == ["p2p/memfd", "fake/memory"]
    for path in peer.paths():
        begun, _ = peer.read_scratch(path)
        assert await_end(begun) == "done"
    peer.use_path("p2p/memfd")
    num_reads = len(puller.fake.fabric.reads)
    assert read(peer, [1], [2]) == "done"
    assert torch.equal(puller.rank.memory.kv_cache[1], holder.rank.memory.kv_cache[2])
    assert len(puller.fake.fabric.reads) == num_reads
    peer.close()


@pytest.mark.parametrize("side", ["puller", "holder"])
def test_a_path_that_one_side_lacks_is_tried_and_says_why(
    both: Callable[..., Both], side: str
) -> None:
    lacking = {"source": PrivateKVMemory()}
    puller, holder = (
        both("a", **lacking if side == "puller" else {}),
        both("b", **lacking if side == "holder" else {}),
    )
    peer = puller.rank.add(holder.rank)
    assert peer.paths() == ["fake/memory", "p2p"]
    with pytest.raises(TransferError, match="this process alone"):
        peer.read_scratch("p2p")
    peer.use_path("fake/memory")
    assert read(peer, [1], [2]) == "done"
    peer.close()


def test_without_any_path_the_reasons_of_all_are_told(both: Callable[..., Both]) -> None:
    puller, holder = both("a"), both("b", host="elsewhere")
    puller.fake.peers.append("b#1")
    with pytest.raises(
        TransferError, match=r"p2p: b#1 is not on this host.*; fake/memory: b#1 is there already"
    ):
        puller.rank.add(holder.rank)
    puller.fake.peers.clear()
    with pytest.raises(TransferError, match="cannot be read"):
        puller.paths.connect(holder.rank.card(metadata=b"nonsense"))
