"""Fakes of the transfer thread's environment: a clock, memory of several ranks in one process, side
channels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pdlaunch.config.engine_spec import EngineSpec
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.engine.kvcache.groups import KVCacheLayout, make_groups
from pdlaunch.errors import TransferError
from pdlaunch.protocol.control import Address, Entry
from pdlaunch.protocol.kv_params import RemoteKV
from pdlaunch.protocol.side_channel import HandshakeReply, ToDecodeSide, ToPrefillSide
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    Read,
    ReadState,
)
from pdlaunch.transfer.connectors.scratch import PATTERN_BYTES
from tests.engine.real_steps import make_spec

PATIENT = {"pull_timeout_s": 60.0, "pull_attempts": 1}


def spec_of(
    role: str = "prefill",
    *,
    name: str = "prefill-0",
    tp_size: int = 1,
    block_size: int = 16,
    dtype: str = "float32",
    **kv_transfer: Any,
) -> EngineSpec:
    return make_spec(
        "/nowhere",
        name=name,
        role=role,
        dtype=dtype,
        block_size=block_size,
        tensor_parallel_size=tp_size,
        kv_transfer=KVTransferSettings(**(PATIENT | kv_transfer)),
    )


def entry_of(
    engine: str, role: str, engine_id: str, endpoint: str, tp_rank: int = 0, **fields: Any
) -> Entry:
    return Entry(
        name=f"{engine}/rank-{tp_rank}",
        kind="rank",
        engine=engine,
        role=role,
        tp_rank=tp_rank,
        engine_id=engine_id,
        address=Address(side_channel=endpoint),
        **{"incarnation": 1} | fields,
    )


def remote_of(engine_id: str, lease_id: str) -> RemoteKV:
    """As in kv_transfer_params. Host and port are wrong, since the puller may not use them."""
    return RemoteKV(
        engine_id=engine_id, lease_id=lease_id, host="h", port=1, block_ids=[], num_tokens=1
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
    """The memory that connectors of several ranks in this process share, and its present faults."""

    agents: dict[str, LocalMemory] = field(default_factory=dict)
    stalled: bool = False  # READs stay pending until ``land``
    failing: bool = False  # READs end as failed
    reads: list[FakeRead] = field(default_factory=list)

    def land(self) -> None:
        """Let the stalled READs write. Like real READs, they cannot be cancelled."""
        for read in self.reads:
            read.land()

    def kill(self) -> None:
        """The peer dies: stalled READs end and write no more bytes."""
        for read in self.reads:
            read.fail()


class FakeRead(Read):
    """A READ that references memory only while it may write."""

    def __init__(self, fabric: Fabric, copy: Callable[[], object]) -> None:
        self.fabric = weakref.proxy(fabric)  # the fabric holds its READs
        self.state: ReadState = "pending"
        self.released = False
        self._copy: Callable[[], object] | None = copy

    def land(self) -> None:
        """Let all bytes arrive, unless the READ has ended."""
        if self._copy is not None:
            self._copy()
            self.state, self._copy = "done", None

    def fail(self) -> None:
        """End the READ without further bytes, unless it has ended."""
        if self._copy is not None:
            self.state, self._copy = "failed", None

    def poll(self) -> ReadState:
        assert not self.released
        return self.state

    def seconds(self) -> float:
        return 0.001

    def release(self) -> None:
        assert self.state != "pending"
        assert not self.released
        self.released = True


class FakeConnector(Connector):
    name = "fake"
    path = "fake/memory"
    read_class = FakeRead

    def __init__(self, agent_name: str, fabric: Fabric) -> None:
        self.agent_name = agent_name
        self.fabric = fabric
        self.peers: list[str] = []
        self.added: list[str] = []

    def open(self, memory: LocalMemory) -> None:
        self.memory = memory
        self.fabric.agents[self.agent_name] = memory

    def agent_metadata(self) -> bytes:
        return self.agent_name.encode()

    def connect(self, peer: HandshakeReply) -> Mapping[str, FakeConnection]:
        name = peer.agent_name
        assert peer.agent_metadata.decode() == name
        if name in self.peers:
            raise TransferError(f"{name} is there already")
        self.peers.append(name)
        self.added.append(name)
        return {self.path: FakeConnection(self, name)}

    def close(self) -> None:
        assert not self.peers or any(read.state == "pending" for read in self.fabric.reads)
        del self.memory, self.fabric.agents[self.agent_name]


class FakeConnection(Connection):
    def __init__(self, connector: FakeConnector, peer: str) -> None:
        self.connector = connector
        self.peer = peer
        self.fabric = connector.fabric
        self.reads: list[FakeRead] = []

    def read(self, blocks: BlockRead) -> Read:
        remote, local = self.fabric.agents[self.peer].kv, self.connector.memory.kv

        def copy() -> None:
            for here, there in zip(
                local.views(blocks.local_blocks, blocks.local_heads),
                remote.views(blocks.remote_blocks, blocks.remote_heads),
                strict=True,
            ):
                here.copy_(there)

        return self._start(copy)

    def read_scratch(self, landing: torch.Tensor, piece_bytes: int) -> Read:
        remote = self.fabric.agents[self.peer].scratch.view(-1, PATTERN_BYTES)[0]
        return self._start(lambda: landing.view(-1, PATTERN_BYTES).copy_(remote))

    def close(self) -> None:
        assert all(read.state != "pending" for read in self.reads), "a READ may still write"
        self.connector.peers.remove(self.peer)

    def _start(self, copy: Callable[[], object]) -> Read:
        read = self.connector.read_class(self.fabric, copy)
        self.fabric.reads.append(read)
        self.reads.append(read)
        if self.fabric.failing:
            read.fail()
        elif not self.fabric.stalled:
            read.land()
        return read


@dataclass(eq=False)
class FakeChannel:
    """The puller's end of a side channel whose holder lives in the same process."""

    ask: Callable[[FakeChannel, ToPrefillSide], None]  # receives the messages to the holder
    # Changes answers on their way to the puller.
    change: Callable[[ToDecodeSide], ToDecodeSide] = lambda reply: reply
    socket: Any = None
    mute: bool = False  # messages arrive, answers do not
    sent: list[ToPrefillSide] = field(default_factory=list)
    inbox: list[ToDecodeSide] = field(default_factory=list)
    closed: bool = False
    broken: bool = False

    def send(self, message: ToPrefillSide) -> None:
        self.sent.append(message)
        self.ask(self, message)

    def take(self, reply: ToDecodeSide) -> None:
        if not self.mute:
            self.inbox.append(self.change(reply))

    def receive(self) -> list[ToDecodeSide]:
        received, self.inbox = self.inbox, []
        return received

    def close(self) -> None:
        self.closed = True
