"""The P2P connector on a CPU, with holder and puller in one process: its copies, its descriptors
over a Unix socket, and the choice between P2P and another connector.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdlaunch.engine.memory.kv_memory import HostKVMemory, PrivateKVMemory
from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import HandshakeReply
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    pieces_to_read,
)
from pdlaunch.transfer.connectors.nixl import PathsConnector
from pdlaunch.transfer.connectors.p2p import TOKEN_BYTES, FdServer, P2PConnector, fetch_fds
from pdlaunch.transfer.connectors.piece_copies import HostCopier
from pdlaunch.transfer.connectors.scratch import PATTERN_BYTES, has_pattern, write_pattern
from pdlaunch.transfer.handshake import RankIdentity
from pdlaunch.transfer.regions import Pieces, merge, native_regions
from tests.e2e.waiting import await_true
from tests.engine.memory.open_files import num_open_fds
from tests.other_user import as_nobody
from tests.transfer.fakes import Fabric, FakeConnector, layout_of, random_cache
from tests.transfer.pull_world import card_of, compatibility

TIMEOUT_S = 180.0
NUM_BLOCKS = 8
SCRATCH_BYTES = 4 * PATTERN_BYTES
ALL = range(3)
HOLDER = RankIdentity("prefill-0/rank-0", "prefill-0", "a" * 32, 1, 0, 1)


@dataclass
class Rank:
    connector: Connector
    memory: LocalMemory

    @property
    def kv_cache(self) -> torch.Tensor:
        """The KV cache, [num_blocks, num_heads, ..]."""
        return self.memory.kv.regions[0]

    def add(self, peer: Rank) -> Connection:
        (connection,) = self.connector.connect(peer.card()).values()
        assert isinstance(connection, Connection)
        return connection

    def card(self, **changes: Any) -> HandshakeReply:
        layout = layout_of(self.memory.kv.num_heads)
        card = card_of(self.connector, self.memory, HOLDER, compatibility(layout))
        return msgspec.structs.replace(card, **changes)


def memory_of(name: str, *, num_heads: int = 3) -> LocalMemory:
    source, layout = HostKVMemory(), layout_of(num_heads)
    pages = source.zeros(NUM_BLOCKS * layout.block_bytes).view(torch.float32)
    kv_cache = pages.view(NUM_BLOCKS, *layout.block_shape())
    kv_cache.copy_(random_cache(layout, NUM_BLOCKS, sum(name.encode())))
    scratch = source.zeros(SCRATCH_BYTES)
    write_pattern(scratch, f"{name}#1")
    return LocalMemory(native_regions(kv_cache, layout), scratch, source)


def p2p(name: str, **options: Any) -> P2PConnector:
    return P2PConnector(name, 1, **{"host": "here"} | options)


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    gc.collect()  # objects that other tests have left
    before = num_open_fds()
    yield
    for thread in [thread for thread in threading.enumerate() if thread.name == "fd-server"]:
        thread.join(TIMEOUT_S)
    gc.collect()
    # A server closes its end of a connection shortly after the reader.
    await_true(lambda: num_open_fds() <= before, "all files are closed", TIMEOUT_S)


Open = Callable[..., Rank]


@pytest.fixture
def open_rank() -> Iterator[Open]:
    """Yield a function that opens ranks; at the end, all open ranks are closed."""
    opened: list[Rank] = []

    def open_one(
        name: str, connector: Connector | None = None, *, num_heads: int = 3, **options: Any
    ) -> Rank:
        memory = memory_of(name, num_heads=num_heads)
        if source := options.pop("source", None):
            memory = replace(memory, source=source)
        opened.append(Rank(connector or p2p(name, **options), memory))
        opened[-1].connector.open(memory)
        return opened[-1]

    yield open_one
    for rank in opened:
        rank.connector.close()
        assert rank.connector.wait_unmapped(TIMEOUT_S)
    opened.clear()  # pytest keeps a reference to the function above


def await_end(begun: Any) -> str:
    deadline_at = time.monotonic() + TIMEOUT_S
    while (state := begun.poll()) == "pending" and time.monotonic() < deadline_at:
        time.sleep(0.001)
    begun.release()
    return state


def read(
    peer: Connection, local: list[int], remote: list[int], here: range = ALL, there: range = ALL
) -> str:
    return await_end(peer.read(BlockRead([local], [remote], here, there)))


def test_blocks_heads_and_scratch_arrive_where_they_belong(open_rank: Open) -> None:
    one, two = open_rank("a"), open_rank("b", num_heads=1)
    peer, back = one.add(two), two.add(one)
    expected = one.kv_cache.clone()
    expected[[6, 2, 3], 1] = two.kv_cache[[1, 4, 5], 0]
    assert read(peer, [6, 2, 3], [1, 4, 5], range(1, 2), range(0, 1)) == "done"
    assert torch.equal(one.kv_cache, expected)
    assert read(back, [0], [7], range(0, 1), range(2, 3)) == "done"
    assert torch.equal(two.kv_cache[0, 0], one.kv_cache[7, 2])
    landing = torch.zeros(PATTERN_BYTES, dtype=torch.uint8)
    assert await_end(peer.read_scratch(landing, 8192)) == "done"
    assert has_pattern(landing, "b#1")
    peer.close()
    back.close()


def test_adjacent_blocks_in_any_order_need_one_copy(open_rank: Open) -> None:
    one, two = open_rank("a"), open_rank("b")
    blocks = BlockRead([[6, 4, 5]], [[3, 1, 2]], ALL, ALL)
    destinations, _, _ = merge(*pieces_to_read(one.memory, two.card(), blocks))
    assert len(destinations) == 1


def test_memory_is_unmapped_with_its_peer_and_mapped_anew_after_a_sleep(open_rank: Open) -> None:
    puller, holder = open_rank("a"), open_rank("b")
    peer, card = puller.add(holder), holder.card()
    holder.connector.close()
    assert not holder.connector.wait_unmapped(0)
    assert read(peer, [0], [1]) == "done", "what is mapped stays so until it is removed"
    peer.close()
    assert holder.connector.wait_unmapped(TIMEOUT_S)
    with pytest.raises(TransferError, match="the owner did not share memory"):
        puller.connector.connect(card)
    holder.connector.open(holder.memory)
    again = puller.add(holder)
    assert read(again, [3], [4]) == "done"
    assert torch.equal(puller.kv_cache[3], holder.kv_cache[4])
    again.close()


def test_a_read_is_pending_until_its_thread_has_copied_and_fails_with_it(open_rank: Open) -> None:
    going_on, fails = threading.Event(), [True, False]

    def move(*_: int) -> None:
        assert going_on.wait(TIMEOUT_S)
        if fails.pop():
            raise OSError("bad memory")

    puller, holder = open_rank("a", new_copier=lambda device: HostCopier(move)), open_rank("b")
    peer = puller.add(holder)
    begun = [peer.read(BlockRead([[0]], [[1]], ALL, ALL)) for _ in range(2)]
    assert [each.poll() for each in begun] == ["pending", "pending"]
    going_on.set()
    assert [await_end(each) for each in begun] == ["done", "failed"]
    peer.close()


def test_a_peer_of_another_host_or_with_other_sizes_is_refused_and_leaves_nothing_open(
    open_rank: Open,
) -> None:
    puller, holder = open_rank("a"), open_rank("b")
    before, connect = num_open_fds(), puller.connector.connect
    with pytest.raises(TransferError, match="metadata of agent b#1 cannot be read"):
        connect(holder.card(agent_metadata=b"nonsense"))
    for changes in ({"num_blocks": 9}, {"scratch_bytes": SCRATCH_BYTES + 1}):
        geometry = msgspec.structs.replace(holder.card().geometry, **changes)
        with pytest.raises(TransferError, match="bytes that it does not share"):
            connect(holder.card(geometry=geometry))
    card = msgspec.msgpack.decode(holder.connector.agent_metadata())
    (start, shared), *others = card["ranges"]
    wrong = card | {"ranges": [(start, shared | {"offset_bytes": 4096}), *others]}
    with pytest.raises(TransferError, match=r"cannot be mapped: .* not within"):
        connect(holder.card(agent_metadata=msgspec.msgpack.encode(wrong)))
    # The holder closes its end of the last connection at the next one.
    await_true(lambda: num_open_fds() <= before + 1, "all else is closed")
    for host in ("elsewhere", ""):
        stranger = open_rank(f"c{host}", host=host)
        for one, other in ((puller, stranger), (stranger, puller if host else stranger)):
            with pytest.raises(TransferError, match="not on this host"):
                one.add(other)


SIZE, NUM_SLOTS = 4, 16


@given(
    to=st.permutations(range(NUM_SLOTS)),
    of=st.permutations(range(NUM_SLOTS)),
    count=st.integers(1, NUM_SLOTS),
)
def test_merged_pieces_move_the_same_bytes_in_the_fewest_copies(to, of, count) -> None:
    to, of = to[:count], of[:count]
    source = np.arange(NUM_SLOTS * SIZE, dtype=np.uint8)
    expected, found = np.zeros_like(source), np.zeros_like(source)
    for here, there in zip(to, of, strict=True):
        expected[here * SIZE : (here + 1) * SIZE] = source[there * SIZE : (there + 1) * SIZE]
    sides = (
        Pieces(
            np.array(slots, dtype=np.uint64) * np.uint64(SIZE) + np.uint64(memory.ctypes.data),
            np.full(len(slots), SIZE, dtype=np.uint64),
        )
        for slots, memory in ((to, found), (of, source))
    )
    columns = merge(*sides)
    for destination, address, size in zip(*(column.tolist() for column in columns), strict=True):
        ctypes.memmove(destination, address, size)
    np.testing.assert_array_equal(found, expected)
    steps = zip(to, to[1:], of, of[1:], strict=False)
    assert len(columns[0]) == 1 + sum((b - a, d - c) != (1, 1) for a, b, c, d in steps)


# Descriptors: only for processes with the token; closed when either side goes


@pytest.fixture
def server() -> Iterator[FdServer]:
    files = [os.memfd_create(f"test-{index}") for index in range(3)]
    for index, fd in enumerate(files):
        os.write(fd, bytes([index]) * 4)
    server = FdServer(files)
    yield server
    server.close()
    assert server.wait_unused(TIMEOUT_S)
    for fd in files:
        os.close(fd)


def fetch(server: FdServer) -> socket.socket:
    """Fetch descriptors, check that they are those of the files in order; return the connection."""
    fds, use = fetch_fds(server.address, server.token, 3, TIMEOUT_S)
    assert [os.pread(fd, 10, 0) for fd in fds] == [bytes([index]) * 4 for index in range(3)]
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in fds:
        os.close(fd)
    return use


def test_the_owner_knows_until_when_its_memory_is_in_use(server: FdServer) -> None:
    first, second = fetch(server), fetch(server)
    first.close()
    server.close()
    assert not server.wait_unused(0)
    second.close()
    assert server.wait_unused(TIMEOUT_S)
    with pytest.raises(TransferError, match="the owner did not share memory"):
        fetch(server)


@pytest.mark.parametrize("token", [b"", b"x", b"x" * TOKEN_BYTES, b"x" * 1000])
def test_without_the_token_nothing_is_handed_over(server: FdServer, token: bytes) -> None:
    before = num_open_fds()
    with pytest.raises(TransferError, match="the owner did not share memory"):
        fetch_fds(server.address, token, 3, TIMEOUT_S)
    await_true(lambda: num_open_fds() <= before, "the server has closed its end, too")
    assert server.wait_unused(0)
    fetch(server).close()


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_gets_nothing_with_the_token(server: FdServer) -> None:
    def ask() -> dict[str, str]:
        answer = b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(TIMEOUT_S)
            stranger.connect(f"\0{server.address}")
            with contextlib.suppress(ConnectionError):  # it may be refused already
                stranger.send(server.token)
                answer, _, _, _ = socket.recv_fds(stranger, 100, 16)
        return {"answer": answer.decode()}

    assert as_nobody(ask) == {"answer": ""}


# Together with another connector


@pytest.fixture
def open_both(open_rank: Open) -> Open:
    """A function that opens ranks with P2P and a fake connector in place of NIXL."""
    fabric = Fabric()

    def open_one(name: str, source: Any = None, **options: Any) -> Rank:
        connectors = [FakeConnector(f"{name}#1", fabric), p2p(name, **options)]
        return open_rank(name, PathsConnector(connectors), source=source)

    return open_one


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_path_that_one_side_lacks_says_why(open_both: Open, side: str) -> None:
    lacking = {"source": PrivateKVMemory()}
    puller, holder = (open_both(name, **lacking if name == side else {}) for name in ("a", "b"))
    found = puller.connector.connect(holder.card())
    assert list(found) == ["p2p", "fake/memory"]
    assert "this process alone" in str(found["p2p"])
    found["fake/memory"].close()
