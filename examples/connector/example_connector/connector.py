"""Reads the memory of another process of this host through ``/proc/PID/mem``."""

import ctypes
import os
import time
from collections.abc import Mapping

import torch

from example_connector import ExampleSettings
from pdlaunch.config.kv_transfer import KVTransferSettings
from pdlaunch.errors import TransferError
from pdlaunch.protocol.side_channel import HandshakeReply
from pdlaunch.transfer.connectors.connector import (
    BlockRead,
    Connection,
    Connector,
    LocalMemory,
    Read,
    ReadState,
    pieces_to_read,
)

_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)


class ExampleConnector(Connector):
    name = "example"
    path = "example/memory"

    def __init__(self, rank: str, incarnation: int, max_read_bytes: int) -> None:
        self.agent_name = f"{rank}#{incarnation}"
        self.max_read_bytes = max_read_bytes

    def open(self, memory: LocalMemory) -> None:
        if memory.scratch.device.type != "cpu":
            raise TransferError("the example reads host memory only")
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY)  # peers are not parents of this process
        self.memory = memory

    def agent_metadata(self) -> bytes:
        return str(os.getpid()).encode()

    def connect(self, peer: HandshakeReply) -> Mapping[str, Connection]:
        return {self.path: _Connection(self, peer, int(peer.agent_metadata))}

    def close(self) -> None:
        del self.memory


class _Connection(Connection):
    def __init__(self, connector: ExampleConnector, peer: HandshakeReply, pid: int) -> None:
        self.connector, self.peer = connector, peer
        self.remote = os.open(f"/proc/{pid}/mem", os.O_RDONLY)

    def read(self, blocks: BlockRead) -> Read:
        to, of = pieces_to_read(self.connector.memory, self.peer, blocks)
        if to.sizes.sum() > self.connector.max_read_bytes:
            raise TransferError("longer than kv_transfer.example.max_read_bytes")
        began_at = time.perf_counter()
        for piece in zip(to.addresses, of.addresses, to.sizes, strict=True):
            self._copy(*map(int, piece))
        return _DoneRead(time.perf_counter() - began_at)

    def read_scratch(self, landing: torch.Tensor, piece_bytes: int) -> Read:
        began_at = time.perf_counter()
        self._copy(landing.data_ptr(), self.peer.geometry.scratch_address, landing.numel())
        return _DoneRead(time.perf_counter() - began_at)

    def close(self) -> None:
        os.close(self.remote)

    def _copy(self, ours: int, theirs: int, num_bytes: int) -> None:
        target = (ctypes.c_char * num_bytes).from_address(ours)
        try:
            copied = os.preadv(self.remote, [target], theirs)
        except OSError as error:
            raise TransferError(f"{self.peer.agent_name}: {error}") from error
        if copied != num_bytes:
            raise TransferError(f"{self.peer.agent_name}: {copied} of {num_bytes} bytes")


class _DoneRead(Read):
    """A READ that is done from the start: ``read`` blocks until all bytes are copied."""

    def __init__(self, read_s: float) -> None:
        self.read_s = read_s

    def poll(self) -> ReadState:
        return "done"

    def seconds(self) -> float:
        return self.read_s

    def release(self) -> None:
        """Do nothing: a READ has no resources."""


def new_connector(settings: KVTransferSettings, name: str, incarnation: int) -> ExampleConnector:
    """Return the connector of a rank: ``ExampleSettings.factory`` names this function."""
    section = settings.section("example")
    assert isinstance(section, ExampleSettings)
    return ExampleConnector(name, incarnation, section.max_read_bytes)
