"""Stand-ins for what the transfer thread talks to: a clock, memory of several ranks in one process,
side channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.protocol.side_channel import Geometry, ToDecodeSide, ToPrefillSide
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connector,
    Landing,
    LocalMemory,
    PeerHandle,
    ReadHandle,
    ReadState,
)
from pdlaunch.transfer.connectors.scratch import PATTERN_BYTES


@dataclass
class FakeClock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def spec_of(
    role: str = "prefill",
    *,
    name: str = "prefill-0",
    tp_size: int = 1,
    block_size: int = 16,
    dtype: str = "float32",
    **kv_transfer: Any,
) -> EngineSpec:
    return EngineSpec.model_validate(
        {
            "name": name,
            "role": role,
            "model_dir": "/nowhere",
            "served_model_name": "m",
            "load_format": "dummy",
            "dtype": dtype,
            "max_model_len": 1024,
            "block_size": block_size,
            "enable_cumem_allocator": False,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 512,
            "device": "cpu",
            "device_indices": (),
            "tensor_parallel_size": tp_size,
            "num_threads": 1,
            "kv_transfer": KVTransferSettings(**kv_transfer),
        }
    )


def layout_of(
    num_kv_heads: int = 3, *, block_size: int = 16, num_layers: int = 2, head_dim: int = 4
) -> KVCacheLayout:
    return KVCacheLayout(
        groups=make_groups([None] * num_layers),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype_bytes=4,
    )


def random_cache(layout: KVCacheLayout, num_blocks: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num_blocks, *layout.block_shape()), generator=generator)


@dataclass
class Fabric:
    """Memory that connectors of several ranks in this process share, and what is wrong with it
    today.
    """

    agents: dict[str, LocalMemory] = field(default_factory=dict)
    stalled: bool = False
    """READs stay pending until ``land``."""
    failing: bool = False
    """READs end as failed."""
    landings: Sequence[Landing] = ()
    """Of every READ that is pending."""
    reads: list[FakeRead] = field(default_factory=list)

    def land(self) -> None:
        """Let the stalled READs write: they cannot be taken back."""
        for read in self.reads:
            read.land()

    def kill(self) -> None:
        """The peer dies: stalled READs end without writing more."""
        for read in self.reads:
            read.fail()


class FakeRead:
    """Refers to memory only as long as it may write."""

    def __init__(self, copy: Callable[[], object]) -> None:
        self.state: ReadState = "pending"
        self.released = False
        self._copy: Callable[[], object] | None = copy

    def land(self) -> None:
        """All bytes arrive, unless it is over."""
        if self._copy is not None:
            self._copy()
            self.state, self._copy = "done", None

    def fail(self) -> None:
        """It ends without writing more, unless it is over."""
        if self._copy is not None:
            self.state, self._copy = "failed", None


class FakeConnector(Connector):
    """Copies within this process."""

    name = "fake"
    path = "fake/memory"

    def __init__(self, agent_name: str, fabric: Fabric) -> None:
        self.agent_name = agent_name
        self.fabric = fabric
        self.peers: list[str] = []
        self.added: list[str] = []
        self.block_reads: list[BlockRead] = []

    def open(self, memory: LocalMemory) -> None:
        self.memory = memory
        self.fabric.agents[self.agent_name] = memory

    def agent_metadata(self) -> bytes:
        return self.agent_name.encode()

    def add_peer(self, agent_name: str, metadata: bytes, geometry: Geometry) -> PeerHandle:
        assert metadata.decode() == agent_name
        if agent_name in self.peers:
            raise TransferError(f"{agent_name} is there already")
        self.peers.append(agent_name)
        self.added.append(agent_name)
        return agent_name  # type: ignore[return-value]

    def remove_peer(self, peer: PeerHandle) -> None:
        self.peers.remove(peer)  # type: ignore[arg-type]

    def start_read(self, peer: PeerHandle, read: BlockRead) -> ReadHandle:
        self.block_reads.append(read)
        remote = self.fabric.agents[peer].kv_cache  # type: ignore[index]
        local = self.memory.kv_cache

        def copy() -> None:
            for here, there in zip(read.local_blocks, read.remote_blocks, strict=True):
                for local_head, remote_head in zip(
                    read.local_heads, read.remote_heads, strict=True
                ):
                    local[here, local_head] = remote[there, remote_head]

        return self._start(copy)

    def start_scratch_read(self, peer: PeerHandle, path: str) -> tuple[ReadHandle, torch.Tensor]:
        remote = self.fabric.agents[peer].scratch.view(-1, PATTERN_BYTES)[0]  # type: ignore[index]
        landing = torch.zeros_like(remote)
        return self._start(lambda: landing.copy_(remote)), landing

    def poll(self, handle: ReadHandle) -> ReadState:
        assert not handle.released  # type: ignore[attr-defined]
        return handle.state  # type: ignore[attr-defined]

    def landings(self, handle: ReadHandle) -> Sequence[Landing]:
        return self.fabric.landings

    def read_s(self, handle: ReadHandle) -> float:
        return 0.001

    def release(self, handle: ReadHandle) -> None:
        assert handle.state != "pending"  # type: ignore[attr-defined]
        assert not handle.released  # type: ignore[attr-defined]
        handle.released = True  # type: ignore[attr-defined]

    def close(self) -> None:
        assert not self.peers or any(read.state == "pending" for read in self.fabric.reads)
        del self.memory, self.fabric.agents[self.agent_name]

    def _start(self, copy: Callable[[], object]) -> ReadHandle:
        read = FakeRead(copy)
        self.fabric.reads.append(read)
        if self.fabric.failing:
            read.fail()
        elif not self.fabric.stalled:
            read.land()
        return read  # type: ignore[return-value]


@dataclass
class FakeChannel:
    """The puller's end of a side channel whose holder lives in the same process."""

    answer: Callable[[ToPrefillSide], ToDecodeSide | None]
    socket: Any = None
    mute: bool = False
    """Messages arrive, answers do not."""
    sent: list[ToPrefillSide] = field(default_factory=list)
    inbox: list[ToDecodeSide] = field(default_factory=list)
    closed: bool = False
    broken: bool = False

    def send(self, message: ToPrefillSide) -> None:
        self.sent.append(message)
        reply = self.answer(message)
        if reply is not None and not self.mute:
            self.inbox.append(reply)

    def receive(self) -> list[ToDecodeSide]:
        received, self.inbox = self.inbox, []
        return received

    def close(self) -> None:
        self.closed = True
