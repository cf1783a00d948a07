"""What the NIXL connector asks of NIXL, counted by an agent that stands in for NIXL's own."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from pdlaunch.errors import TransferError
from pdlaunch.transfer.connectors.connector import BlockRead, Connection, LocalMemory, PeerAgent
from pdlaunch.transfer.connectors.nixl import NixlConnector
from pdlaunch.transfer.handshake import geometry_of
from tests.transfer.fakes import layout_of, random_cache

NUM_BLOCKS = 16
LOCAL_BLOCKS, REMOTE_BLOCKS = [1, 2, 7, 9], [12, 3, 4, 0]


@dataclass
class Descriptors:
    """Pieces of memory that a READ names by their index."""

    addresses: list[int]
    piece_bytes: int

    def release(self) -> None:
        pass


@dataclass
class Transfer:
    local: list[int]
    remote: list[int]
    """Addresses of its pieces."""
    piece_bytes: int

    def release(self) -> None:
        pass


class CountingAgent:
    """Copies within this process."""

    def __init__(self) -> None:
        self.registered: list[int] = []
        """Addresses, now."""
        self.num_registrations = 0
        self.num_prepared = 0
        self.transfers: list[Transfer] = []
        self.agent: Any = None

    def create_backend(self, backend: str, parameters: dict[str, str]) -> None:
        assert backend == "UCX"
        assert parameters == {"ucx_error_handling_mode": "none"}

    def register_memory(self, tensor: torch.Tensor) -> int:
        self.num_registrations += 1
        self.registered.append(tensor.data_ptr())
        return tensor.data_ptr()

    def deregister_memory(self, address: int) -> None:
        self.registered.remove(address)

    def get_agent_metadata(self) -> bytes:
        return self.agent.name.encode()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        return metadata

    def prep_xfer_dlist(self, agent_name: str, pieces: Any, kind: str) -> Descriptors:
        self.num_prepared += 1
        ((base, piece_bytes, _, stride, count),) = pieces.tolist()
        return Descriptors([base + index * stride for index in range(count)], piece_bytes)

    def get_xfer_descs(self, pieces: Any, kind: str) -> Descriptors:
        (piece_bytes,) = {size for _, size, _ in pieces.tolist()}
        return Descriptors([address for address, _, _ in pieces.tolist()], piece_bytes)

    def make_prepped_xfer(
        self, operation: str, local: Descriptors, here: Any, remote: Descriptors, there: Any
    ) -> Transfer:
        assert operation == "READ"
        assert local.piece_bytes == remote.piece_bytes
        return Transfer(
            [local.addresses[index] for index in here],
            [remote.addresses[index] for index in there],
            local.piece_bytes,
        )

    def initialize_xfer(
        self, operation: str, local: Descriptors, remote: Descriptors, agent_name: str
    ) -> Transfer:
        assert operation == "READ"
        return Transfer(local.addresses, remote.addresses, local.piece_bytes)

    def transfer(self, transfer: Transfer) -> str:
        self.transfers.append(transfer)
        for local, remote in zip(transfer.local, transfer.remote, strict=True):
            ctypes.memmove(local, remote, transfer.piece_bytes)
        return "DONE"


class Rank:
    """A connector over its own KV cache, and the agent that it believes to be NIXL's."""

    def __init__(self, name: str, num_heads: int, *, first_head: int = 0) -> None:
        self.layout = layout_of(num_heads)
        self.kv_cache = random_cache(self.layout, NUM_BLOCKS, seed=sum(name.encode()))
        self.agent = CountingAgent()
        api = SimpleNamespace(
            nixl_agent=lambda name, config: self.agent, nixl_agent_config=lambda backends: None
        )
        bindings = SimpleNamespace(
            nixlAgentConfig=SimpleNamespace,
            NIXL_THREAD_SYNC_NONE=0,
            nixlAgent=lambda name, config: SimpleNamespace(name=name, config=config),
        )
        self.connector = NixlConnector(name, 1, load=lambda: (api, bindings))
        self.memory = LocalMemory(
            self.kv_cache, torch.arange(64 * 1024, dtype=torch.int32).view(torch.uint8), self.layout
        )
        self.connector.open(self.memory)
        self.geometry = geometry_of(self.memory, first_head)

    def meet(self, other: Rank) -> Connection:
        return self.connector.connect(
            PeerAgent(other.connector.agent_name, other.connector.agent_metadata(), other.geometry)
        )

    def read(self, peer: Connection, local_heads: range, remote_heads: range) -> Transfer:
        read = peer.read(BlockRead(LOCAL_BLOCKS, REMOTE_BLOCKS, local_heads, remote_heads))
        assert read.poll() == "done"
        read.release()
        return self.agent.transfers[-1]


def test_a_peer_with_another_kind_of_memory_is_refused() -> None:
    reader, holder = Rank("decode-0/rank-0", 3), Rank("prefill-0/rank-0", 3)
    holder.geometry = msgspec.structs.replace(holder.geometry, memory_kind="VRAM")
    with pytest.raises(TransferError, match=r"prefill-0/rank-0#1 is in GPU memory, .* in host"):
        reader.meet(holder)
    assert reader.agent.num_prepared == holder.agent.num_prepared


def test_equal_tp_sizes_one_descriptor_a_block() -> None:
    reader, holder = Rank("decode-0/rank-0", 3), Rank("prefill-0/rank-0", 3)
    transfer = reader.read(reader.meet(holder), range(3), range(3))
    assert len(transfer.local) == len(LOCAL_BLOCKS)
    assert transfer.piece_bytes == reader.layout.block_bytes
    assert reader.kv_cache[LOCAL_BLOCKS].equal(holder.kv_cache[REMOTE_BLOCKS])


@pytest.mark.parametrize("holder_tp", [2, 3])
def test_more_holders_than_readers_one_descriptor_a_block_and_head(holder_tp: int) -> None:
    share = 6 // holder_tp
    reader = Rank("decode-0/rank-0", 6)
    for tp_rank in range(holder_tp):
        holder = Rank(f"prefill-0/rank-{tp_rank}", share, first_head=tp_rank * share)
        heads = range(tp_rank * share, (tp_rank + 1) * share)
        transfer = reader.read(reader.meet(holder), heads, range(share))
        assert len(transfer.local) == len(LOCAL_BLOCKS) * share
        assert transfer.piece_bytes == reader.layout.head_bytes
        assert reader.kv_cache[LOCAL_BLOCKS][:, heads].equal(holder.kv_cache[REMOTE_BLOCKS])


@pytest.mark.parametrize("reader_tp", [2, 3])
def test_more_readers_than_holders_one_descriptor_a_block_and_head(reader_tp: int) -> None:
    share = 6 // reader_tp
    holder = Rank("prefill-0/rank-0", 6)
    for tp_rank in range(reader_tp):
        reader = Rank(f"decode-0/rank-{tp_rank}", share, first_head=tp_rank * share)
        heads = range(tp_rank * share, (tp_rank + 1) * share)
        transfer = reader.read(reader.meet(holder), range(share), heads)
        assert len(transfer.local) == len(LOCAL_BLOCKS) * share
        assert reader.kv_cache[LOCAL_BLOCKS].equal(holder.kv_cache[REMOTE_BLOCKS][:, heads])


def test_memory_is_registered_and_described_once_whatever_is_read_from_whom() -> None:
    reader = Rank("decode-0/rank-0", 3)
    own = sorted([reader.kv_cache.data_ptr(), reader.memory.scratch.data_ptr()])
    assert (sorted(reader.agent.registered), reader.agent.num_prepared) == (own, 2)
    for number in range(3):
        holder = Rank(f"prefill-{number}/rank-0", 3)
        peer = reader.meet(holder)
        probe, landing = peer.read_scratch(reader.connector.path)
        assert len(reader.agent.registered) == 3, "the memory that the scratch is read into"
        assert landing.equal(holder.memory.scratch[: len(landing)])
        probe.release()
        for _ in range(4):
            reader.read(peer, range(3), range(3))
            reader.read(peer, range(1), range(2, 3))
        assert sorted(reader.agent.registered) == own
        assert holder.agent.num_registrations == 2
    assert reader.agent.num_registrations == 2 + 3, (
        "of its own memory, and of one landing a handshake"
    )
    assert reader.agent.num_prepared == 2 + 2 * 3, "blocks and heads, of its own and of each peer"


def test_the_progress_thread_does_not_spin() -> None:
    config = Rank("decode-0/rank-0", 3).agent.agent.config
    assert config.useProgThread
    assert config.pthrDelay > 0
